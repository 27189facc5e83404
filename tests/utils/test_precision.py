"""bfloat16 or float32 on a CPU: decided by measured rates, which these tests set themselves."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_training import arguments  # noqa: F401 - a fixture

from ullme.commands import evaluate, train
from ullme.commands.doctor import machine
from ullme.commands.doctor.checks import CheckFailed
from ullme.commands.export.cli import main as export
from ullme.commands.loading_dtype import dtype_to_load
from ullme.models import ULLME
from ullme.models.checkpoint import save_adapter
from ullme.utils import precision
from ullme.utils.precision import choose_precision, cpu_rates, loading_dtype, slow_choice

SLOW, FAST = "float32=72,bfloat16=0.72", "float32=60,bfloat16=110"
BF16, F32 = ("bf16-mixed", "bfloat16"), ("32-true", "float32")


@pytest.fixture
def rates(monkeypatch):
    """Set what the processor can; FAST is one with AVX512-BF16, SLOW one without."""

    def set_rates(text: str) -> None:
        monkeypatch.setenv(precision.RATES_VARIABLE, text)
        cpu_rates.cache_clear()

    yield set_rates
    cpu_rates.cache_clear()


@pytest.mark.parametrize(
    ("asked", "device", "text", "taken"),
    [
        (("auto", "auto"), "cpu", SLOW, F32),
        (("auto", "auto"), "cpu", FAST, BF16),
        (("auto", "auto"), "cuda", SLOW, BF16),
        (("auto", "float32"), "cpu", FAST, ("bf16-mixed", "float32")),
        (("bf16-mixed", "bfloat16"), "cpu", SLOW, BF16),  # explicit choices are obeyed
        ((None, "auto"), "cpu", SLOW, (None, "float32")),  # the LLM is stored in bfloat16
        ((None, "auto"), "cpu", FAST, (None, "auto")),
        ((None, "auto"), "cuda", SLOW, (None, "auto")),
    ],
)
def test_auto_takes_bfloat16_where_it_pays(asked, device, text, taken, rates):
    rates(text)
    chosen = choose_precision(*asked, device, lambda: "bfloat16")
    assert (chosen.precision, chosen.dtype) == taken
    assert (chosen.reason is None) == (asked == taken)


@pytest.mark.parametrize(
    ("stored", "text", "taken"),
    [
        ("bfloat16", SLOW, "float32"),
        ("bfloat16", FAST, "auto"),
        ("float16", FAST, "float32"),
        ("float32", SLOW, "auto"),
        ("float64", SLOW, "auto"),
        (None, SLOW, "auto"),
    ],
)
def test_weights_are_loaded_as_stored_unless_that_is_slow(stored, text, taken, rates):
    rates(text)
    assert loading_dtype("auto", stored, "cpu") == taken
    assert loading_dtype("auto", stored, "cuda") == "auto"
    assert loading_dtype("bfloat16", stored, "cpu") == "bfloat16"


@pytest.mark.parametrize(("bfloat16", "warned"), [(10.1, False), (10, True)])
def test_an_explicit_choice_is_warned_of_from_five_times_slower_on(bfloat16, warned, rates):
    rates(f"float32=50,bfloat16={bfloat16}")
    assert (slow_choice("trainer.precision", "bf16-mixed", "cpu") is not None) == warned
    assert (slow_choice("--dtype", "float16", "cpu") is not None) == warned
    assert slow_choice("trainer.precision", "bf16-mixed", "cuda") is None
    assert slow_choice("trainer.precision", "32-true", "cpu") is None


def test_rates_are_measured_once_and_handed_to_child_processes(rates, monkeypatch):
    calls = []
    rates("")
    monkeypatch.setattr(precision, "_gflops", lambda dtype: calls.append(dtype) or (70.0, 0.7)[len(calls) - 1])
    assert (cpu_rates(), cpu_rates().slowdown) == (precision.CpuRates(70, 0.7), pytest.approx(100))
    assert calls == [torch.float32, torch.bfloat16]
    rates(precision.os.environ[precision.RATES_VARIABLE])
    assert cpu_rates() == precision.CpuRates(70, 0.7)
    assert len(calls) == 2


def test_a_measurement_leaves_the_threads_as_they_were(rates):
    rates("")
    threads = torch.get_num_threads()
    assert min(cpu_rates().float32, cpu_rates().bfloat16) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("text", ["72", "float32=72", "float32=x,bfloat16=1", "float32=0,bfloat16=1"])
def test_rates_that_cannot_be_read(text, rates):
    rates(text)
    with pytest.raises(ValueError, match=r"ULLME_CPU_GFLOPS=.*such as float32=72,bfloat16=0.7"):
        cpu_rates()


def test_ranks_of_torchrun_take_the_first_ones_rates(rates, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = torch.distributed.TCPStore("127.0.0.1", port, is_master=True)
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "7"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    for rank, measured in (("0", FAST), ("1", SLOW)):
        for name, value in {**environment, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        rates("")
        monkeypatch.setattr(precision, "_measured_rates", lambda measured=measured: measured)
        found.append(cpu_rates())
    del agent
    assert found == [precision.CpuRates(60, 110)] * 2


def test_ranks_that_decided_differently_are_refused():
    def trainer(*ranks: str):
        decide = lambda half, all: (min if all else max)(r == "bf16-mixed" for r in ranks)  # noqa: E731
        return SimpleNamespace(precision=ranks[0], strategy=SimpleNamespace(reduce_boolean_decision=decide))

    train.SamePrecision().setup(trainer("32-true", "32-true"), None, "fit")
    with pytest.raises(ValueError, match=r"trainer\.precision=32-true"):
        train.SamePrecision().setup(trainer("32-true", "bf16-mixed"), None, "fit")


def config_of(run):
    saved = yaml.safe_load((run / "config.yaml").read_text())
    return saved["trainer"]["precision"], saved["model"]["backbone"]["dtype"]


@pytest.mark.parametrize(("first", "second", "taken"), [(SLOW, FAST, F32), (FAST, SLOW, BF16)])
def test_a_run_goes_on_with_the_precision_that_it_began_with(
    first,
    second,
    taken,
    arguments,  # noqa: F811
    tmp_path,
    rates,
    caplog,
    recwarn,
):
    auto = ("--trainer.precision=auto", "--model.backbone.dtype=auto", "--checkpoint.every_n_train_steps=1")
    caplog.set_level("INFO")
    rates(first)
    train.main(arguments("run", *auto, "--trainer.max_steps=1", "--trainer.max_epochs=-1"))
    assert config_of(tmp_path / "run") == taken
    assert f"auto: trainer.precision={taken[0]}, model.backbone.dtype={taken[1]} (this CPU does" in caplog.text
    rates(second)
    train.main(arguments("run", *auto, "--trainer.max_steps=2", "--trainer.max_epochs=-1", "--ckpt_path=last"))
    assert config_of(tmp_path / "run") == taken
    assert "as the run was started" in caplog.text
    slow = [str(w.message) for w in recwarn if "100 times slower than float32 on this CPU" in str(w.message)]
    assert len(slow) == (0 if taken == F32 else 2)  # precision and dtype


def test_a_run_of_bfloat16_weights_as_stored_goes_on_with_them(arguments, bfloat16_llm, tmp_path, rates):  # noqa: F811
    """A run that was started before ``dtype: auto`` avoided slow weights is no other run now."""
    llm = (f"--model.backbone.model_name_or_path={bfloat16_llm}", "--trainer.max_epochs=-1")
    rates(FAST)
    train.main(arguments("run", *llm, "--trainer.max_steps=2", "--trainer.limit_train_batches=1"))
    (tmp_path / "run" / "checkpoints" / "finished").unlink()
    assert config_of(tmp_path / "run")[1] == "auto"
    rates(SLOW)
    train.main(arguments("run", *llm, "--trainer.max_steps=2", "--trainer.limit_train_batches=1"))
    assert config_of(tmp_path / "run")[1] == "auto"


def test_a_saved_configuration_says_what_was_taken_on_a_gpu_too(arguments, rates):  # noqa: F811
    rates(SLOW)
    options = [a for a in arguments("run")[1:] if "accelerator" not in a and "seed_everything" not in a]
    given = [*options, "--trainer.precision=auto", "--trainer.accelerator=gpu"]
    config = train.read_configs(given)
    assert (config.trainer.precision, config.model.backbone.dtype) == BF16
    config = train.read_configs([*options, "--trainer.precision=auto", "--trainer.accelerator=cpu"])
    assert (config.trainer.precision, config.model.backbone.dtype) == F32


@pytest.fixture
def bfloat16_llm(tmp_path, llm_folder):
    """A tiny LLM that is stored in bfloat16."""
    model = ULLME(llm_folder(), lora_name=None, dtype="bfloat16", probe=False)
    model.causal_lm.save_pretrained(tmp_path / "llm")
    model.tokenizer.save_pretrained(tmp_path / "llm")
    return str(tmp_path / "llm")


@pytest.mark.parametrize(("text", "dtype"), [(SLOW, torch.float32), (FAST, torch.bfloat16)])
def test_evaluation_of_a_bfloat16_llm(text, dtype, bfloat16_llm, rates, capsys):
    rates(text)
    for extra in ([], ["--dtype=auto"]):
        options = evaluate.parser().parse_args(["--model", bfloat16_llm, "--device=cpu", "--attention=causal", *extra])
        assert next(evaluate._model(options).model.parameters()).dtype == dtype
        assert ("loaded in float32 (this CPU does" in capsys.readouterr().err) == (dtype == torch.float32)
    options = evaluate.parser().parse_args(["--model", bfloat16_llm, "--device=cpu", "--dtype=bfloat16"])
    assert evaluate._dtype(options, "cpu") == "bfloat16"
    assert ("100 times slower" in capsys.readouterr().err) == (dtype == torch.float32)


def test_a_run_that_was_trained_in_bfloat16(make_model, tmp_path, rates):
    run = save_adapter(make_model(dtype="bfloat16"), tmp_path / "run")
    rates(SLOW)
    assert dtype_to_load(None, run, None, "cpu") == "float32"
    assert dtype_to_load(None, run, None, "cuda") is None
    assert dtype_to_load(None, run, "auto", "cpu") == "auto"  # its LLM is stored in float32
    assert dtype_to_load(None, tmp_path / "nothing", None, "cpu") is None  # for the loader to report
    (run / "ullme.json").unlink()
    assert dtype_to_load(None, run, None, "cpu") is None
    rates(FAST)
    assert dtype_to_load(None, run, None, "cpu") is None


@pytest.mark.parametrize("text", [SLOW, FAST])
def test_an_export_keeps_the_dtype_of_the_llm(text, bfloat16_llm, tmp_path, rates):
    pytest.importorskip("sentence_transformers")
    from safetensors.torch import load_file

    rates(text)
    assert export(["--model", bfloat16_llm, "--to", str(tmp_path / "out"), "--device=cpu", "--progress=false"]) == 0
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_the_doctor_shows_both_rates_and_refuses_a_slow_choice(rates):
    rates(SLOW)
    found = machine.precision("cpu")
    assert "float32 72 and bfloat16 0.72 GFLOP/s" in found
    assert "32-true" in found
    with pytest.raises(CheckFailed, match="100 times slower") as trouble:
        machine.precision("cpu", {"trainer.precision": "bf16-mixed"})
    assert trouble.value.remedy == "--trainer.precision=32-true"
    rates(FAST)
    assert "bf16-mixed" in machine.precision("cpu", {"trainer.precision": "bf16-mixed"})


@pytest.mark.parametrize(("text", "expected"), [(SLOW, "float32"), (FAST, "bfloat16")])
def test_a_model_in_python_is_loaded_in_the_faster_dtype(text, expected, rates, llm_folder, tmp_path, monkeypatch):
    """Stored in bfloat16 and loaded with ``dtype: auto``; the options say what was taken, and so does a checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = llm_folder("llama")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rates(text)
    model = ULLME(str(tmp_path), lora_name=None)
    assert str(model.causal_lm.dtype) == f"torch.{expected}"
    assert model.options.dtype == ("float32" if expected == "float32" else "auto")
    assert (
        ULLME(str(tmp_path), lora_name=None, dtype="bfloat16").causal_lm.dtype == torch.bfloat16
    )  # an explicit choice
