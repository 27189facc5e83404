"""ullme doctor finds a tiny world in order, and each thing that can be wrong in it, with what to do."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ullme.__main__ import main as command
from ullme.commands.doctor import cli, correctness, machine, settings
from ullme.commands.doctor.checks import Check, CheckFailed, NotChecked, format_check, run_check, summary
from ullme.commands.doctor.probe_model import select_model
from ullme.commands.doctor.settings import Settings
from ullme.commands.doctor.teacher import teacher
from ullme.models import attention

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

ROW = {"query": "which way", "pos": ["this way"], "neg": ["that way", "no way"]}


@pytest.fixture
def config(tmp_path, llm_folder):
    """The arguments of a configuration in order, as train.py would take it; later ones win."""
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    (tmp_path / "beir" / "corpus.jsonl").write_text(json.dumps({"_id": "d", "title": "", "text": "this way"}))
    (tmp_path / "beir" / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "which way"}))
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("q\td\t1\n")
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(ROW)] * 8))
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text(
        f"model: {{backbone: {{model_name_or_path: {llm_folder()}, lora_r: 4}}}}\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}, batch_size: 4, num_hard_negatives: 2, query_max_length: 128}}\n"
        f"trainer: {{accelerator: cpu, devices: 1, logger: false, default_root_dir: {tmp_path / 'run'}}}\n"
    )
    own.write_text(
        f"loss: {{class_path: ullme.callbacks.GRL, init_args: {{chunk_size: 2}}}}\ndata: {{val: {tmp_path / 'beir'}}}\n"
    )
    return [f"--config={base}", f"--config={own}"]


@pytest.fixture
def read(config):
    def get(*overrides: str) -> Settings:
        options, rest = cli.parser().parse_known_args([*config, *overrides])
        return settings.read(options, rest)

    return get


@pytest.fixture
def probe(tmp_path):
    (tmp_path / "tiny").mkdir()
    return select_model(None, tmp_path / "tiny")


def failed(look) -> Check:
    check = run_check("it", look)
    assert check.passed is False, check
    assert check.found
    assert check.remedy
    return check


def test_a_world_in_order(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command(["doctor", *config, "--fast", "--data.batch_size=8"])
    said = capsys.readouterr().out
    assert end.value.code == 0, said
    for name in (
        "versions",
        "devices",
        "memory",
        "disk",
        "run folder",
        "training data",
        "attention probe",
        "likelihood",
        "teacher",
    ):
        assert f"✓  {name}" in said, said
    assert "0 ✗" in said
    assert "bidirectional attention in all 2 layers, packed rows (the configuration's own" in " ".join(said.split())
    assert "2 ranks" not in said
    assert not (tmp_path / "run").exists()  # nothing is written


def test_something_wrong_is_said_and_is_the_exit_status(config, capsys):
    assert cli.main([*config, "--fast", "--data.train=nowhere.jsonl", "--data.val=null"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "✗ training data" in said
    assert "to do: check the path" in said
    assert "– validation data" in said
    assert "✓ likelihood" in said  # the others go on


@pytest.mark.parametrize("reference", ["frozen_copy", "cached"])
def test_the_reference_as_the_teacher_of_an_llm_without_adapters_is_measured(reference, read, tmp_path):
    """It is computed, and a cache of the run is neither needed nor filled."""
    options = [f"--loss.reference={reference}", f"--loss.cache_reference={tmp_path / 'cache'}"]
    found = read("--model.backbone.lora_name=null", "--loss.teacher=reference", *options)
    assert " positives first among 3 candidates" in teacher(found)
    assert not (tmp_path / "cache").exists()


def test_the_teacher_of_rows_without_labels_is_measured_on_those_with_labels(read, tmp_path):
    (tmp_path / "unjudged.jsonl").write_text("\n".join([json.dumps({"query": "q", "candidates": ["a", "b", "c"]})] * 4))
    kl, labelled = (
        f"{{train: {tmp_path / name}.jsonl, terms: [{terms}]}}"
        for name, terms in (("unjudged", "kl"), ("train", "info_nce"))
    )
    options = ["--data.train=null", "--loss.generation_weight=0"]
    assert " positives first among 3 candidates" in teacher(read(*options, f"--data.datasets=[{labelled}, {kl}]"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=/no/such.yaml"], "--config=/no/such.yaml"),
        (["--data.train=x"], "give --config"),
        (["--config={base}", "--data.batch_sice=2"], "batch_sice"),
    ],
)
def test_mistakes_are_one_line(arguments, message, config, capsys):
    assert cli.main([a.format(base=config[0].removeprefix("--config=")) for a in arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


@pytest.mark.slow
@pytest.mark.distributed
def test_without_a_configuration_all_is_done_within_a_minute(capsys):
    begin = time.process_time()
    checks = cli.run(None)
    assert not [check for check in checks if check.passed is False], capsys.readouterr().out
    assert checks[-1].name == "2 ranks = 1"
    assert checks[-1].passed
    assert time.process_time() - begin < 60


@pytest.mark.slow
def test_a_large_llm_is_stood_in_for_by_a_tiny_one_of_its_family(read, tmp_path):
    big = read("--model.backbone.model_name_or_path=meta-llama/Meta-Llama-3-8B-Instruct")
    (tmp_path / "tiny").mkdir()
    probe = select_model(big, tmp_path / "tiny")
    assert "a tiny random llama, in place of meta-llama/Meta-Llama-3-8B-Instruct" in probe.description
    assert probe.build().hidden_size == 32


@pytest.mark.parametrize("family", ["phi", "gpt2", pytest.param("falcon", marks=pytest.mark.slow)])
def test_another_family_can_be_examined(family, tmp_path, read, llm_folder):
    own = read(f"--model.backbone.model_name_or_path={llm_folder('llama')}")
    own.job = replace(own.job, config=type("Config", (), {"model_type": family})())
    own.is_local = False
    (tmp_path / "tiny").mkdir()
    probe = select_model(own, tmp_path / "tiny")
    model = probe.build()
    assert model.causal_lm.config.model_type == family
    assert "equal to" in correctness.gradcache_is_full_batch(model, probe)
    assert "equal to" in correctness.likelihood_is_direct(model, probe)


# what is wrong with the machine


def test_old_and_missing_libraries(monkeypatch):
    inner = machine.metadata.version

    def version(name):
        if name == "wandb":
            raise machine.metadata.PackageNotFoundError(name)
        return "0.1" if name == "peft" else inner(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    check = failed(machine.versions)
    assert "peft is 0.1" in check.found
    assert "wandb is missing" in check.found
    assert check.remedy.startswith("pip install -U 'peft>=")


def test_a_checkout_says_itself_what_it_needs(monkeypatch):
    def not_installed(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "metadata", not_installed)
    needed, libraries = machine._metadata()
    assert needed == ">=3.11"
    assert any(library.startswith("peft") for library in libraries)


def test_old_python(monkeypatch):
    monkeypatch.setattr(machine, "_metadata", lambda: (">=9.9", []))
    assert ">=9.9 is needed" in failed(machine.versions).found


def test_no_gpu_where_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_check_driver", lambda built_for: None)
    assert "cpu.yaml" in failed(lambda: machine.devices("gpu")).remedy


def test_fewer_gpus_than_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert failed(lambda: machine.devices("auto", "4")).remedy == "--trainer.devices=2"


@pytest.mark.parametrize(("built_for", "word"), [(None, "built for the CPU"), ("13.0", "finds no GPU")])
def test_a_driver_that_torch_cannot_use(built_for, word, monkeypatch, tmp_path):
    (tmp_path / "version").write_text("NVRM version: 470.1\n")
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert word in failed(lambda: machine._check_driver(built_for)).found


def test_a_device_that_computes_wrongly(monkeypatch):
    machine._check_product(torch.device("cpu"))
    monkeypatch.setattr(torch, "allclose", lambda *a, **k: False)
    assert "wrongly" in failed(lambda: machine._check_product(torch.device("cpu"))).found


def test_a_full_disk(tmp_path):
    check = failed(lambda: machine.free_disk(tmp_path / "not" / "there", 2.0**60, "checkpoints"))
    assert "GiB free" in check.found
    assert "--trainer.default_root_dir" in check.remedy


def test_logins(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine.Path, "home", lambda: tmp_path)
    check = failed(lambda: machine.wandb_login(True))
    assert "WANDB_MODE=offline" in check.remedy
    assert run_check("it", lambda: machine.wandb_login(False)).passed is None
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password verysecret\n")
    assert run_check("it", lambda: machine.wandb_login(True)).passed
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    said = run_check("it", lambda: machine.wandb_login(True))
    assert said.passed
    assert "verysecret" not in said.found
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "verysecret")
    said = run_check("it", machine.hub_login)
    assert said.passed
    assert "verysecret" not in said.found


# what is wrong with the configuration


def test_too_little_memory(read, monkeypatch):
    monkeypatch.setattr("ullme.planning.devices.free_memory", lambda device: 2.0**20)
    check = failed(read().memory)
    assert "GiB planned, 0.0 GiB free" in check.found


def test_checkpoints_that_do_not_fit(read, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    assert "2.0 KiB" not in failed(read().disk).found


def test_ranks_that_do_not_fit_the_strategy(read):
    own = read(
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=4",
        "--trainer.strategy.tensor_parallel_size=1",
    )
    assert "set data_parallel_size to 1" in failed(own.trainer).remedy


def test_an_llm_that_is_not_there(read):
    check = failed(read("--model.backbone.model_name_or_path=no/where").backbone)
    assert "no/where" in check.found
    named = read("--model.backbone.model_name_or_path=microsoft/phi-1_5")  # whose shape is known
    assert "HF_HUB_OFFLINE" in failed(named.backbone).found


def test_run_folders(read, tmp_path):
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    (run / "last.ckpt").write_text("")
    assert "resumes from" in read().run_folder()
    (run / "finished").write_text("3 steps")
    assert "finished run" in failed(read().run_folder).found
    file = tmp_path / "train.jsonl"
    assert "is a file" in failed(read(f"--trainer.default_root_dir={file}/run").run_folder).found


def test_a_run_folder_that_cannot_be_written(read, monkeypatch):
    def touch(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    check = failed(read().run_folder)
    assert "Permission denied" in check.found
    assert check.remedy == "name another folder"


@pytest.mark.parametrize(
    ("text", "found"),
    [("{", ":1: broken JSON"), ('{"query": "q", "pos": []}', ":1: no positive"), ("", "no usable row")],
)
def test_bad_training_rows(text, found, read, tmp_path):
    (tmp_path / "train.jsonl").write_text(text)
    assert found in failed(read().train_data).found


def test_bad_rows_may_be_skipped(read, tmp_path):
    (tmp_path / "train.jsonl").write_text(f"{{\n{json.dumps(ROW)}\n")
    assert "the first 1 rows" in read("--data.on_bad_row=skip").train_data()


def test_no_training_rows(read):
    assert failed(read("--data.train=null").train_data).remedy == "give data.train or data.datasets"
    assert "give exactly one of them" in failed(read("--data.datasets=[{train: a}]").train_data).found


def test_configs_of_the_package_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = settings.read(SimpleNamespace(config=["configs/base.yaml"]), ["--model.backbone.model_name_or_path=x"])
    assert found.config.data.batch_size == 512


def test_data_of_the_hub_are_left_to_train(read, tmp_path):
    with pytest.raises(NotChecked, match="dataset of the hub"):
        read("--data.train=Tevatron/msmarco-passage").train_data()
    assert "no such file" in failed(read(f"--data.train={tmp_path / 'no.parquet'}").train_data).found


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("corpus.jsonl", "{", "corpus.jsonl:1: broken JSON"),
        ("queries.jsonl", '{"_id": "q"}', "queries.jsonl:1: missing key 'text'"),
        ("qrels/test.tsv", "q\td\tgood\n1", "test.tsv:2"),
        ("qrels/test.tsv", None, "test.tsv"),
    ],
)
def test_bad_validation_data(file, text, found, read, tmp_path):
    path = tmp_path / "beir" / file
    path.unlink() if text is None else path.write_text(text)
    assert found in failed(read().val_data).found


# what is computed wrongly


def test_attention_that_does_not_obey(probe, monkeypatch):
    for name in attention.PATHS:
        monkeypatch.setitem(attention.PATHS, name, lambda *a, run=attention.PATHS[name]: run(*a[:3], True))
    check = failed(lambda: str(probe.build()))
    assert "cannot be run with bidirectional attention" in check.found


def test_packed_rows_that_differ(probe, monkeypatch):
    model = probe.build()
    assert "equal to" in correctness.packed_is_padded(model, probe)
    monkeypatch.setitem(attention.PATHS, "packed", lambda *a, run=attention.PATHS["packed"]: run(*a[:3], True))
    assert "packed rows differ" in failed(lambda: correctness.packed_is_padded(model, probe)).found
    model.attention_path = "padded"
    with pytest.raises(NotChecked):
        correctness.packed_is_padded(model, probe)


def test_gradients_that_depend_on_the_chunks(probe, monkeypatch):
    model = probe.build()
    assert "28 gradients of info_nce, dpo, kl" in correctness.gradcache_is_full_batch(model, probe)
    inner = probe.objective.grad_cache

    def heavier_with_chunks(model, batch, slices):
        logs = inner(model, batch, slices)
        next(p.grad for p in model.parameters() if p.grad is not None and p.grad.any()).mul_(len(slices))
        return logs

    monkeypatch.setattr(probe.objective, "grad_cache", heavier_with_chunks)
    assert "depends on the chunks" in failed(lambda: correctness.gradcache_is_full_batch(model, probe)).found


def test_a_dropout_of_the_llm_that_stays_on(probe, monkeypatch):
    model = probe.build()
    assert "two forwards are equal" in correctness.llm_dropout_is_off(model, probe)
    layer = attention.decoder_layers(model.causal_lm.base_model)[0]
    layer.register_forward_hook(lambda layer, _, out: torch.nn.functional.dropout(out, 0.1, layer.training))
    check = failed(lambda: correctness.llm_dropout_is_off(model, probe))
    assert "something random in it is still on" in check.found
    assert not model.training
    monkeypatch.setattr(model, "options", replace(model.options, llm_dropout=True))
    with pytest.raises(NotChecked):
        correctness.llm_dropout_is_off(model, probe)


def test_no_gradient_is_no_agreement(probe):
    with pytest.raises(CheckFailed):
        correctness.compare({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, "it is nothing")
    with pytest.raises(CheckFailed):
        correctness.compare({"w": torch.full((2,), torch.nan)}, {"w": torch.ones(2)}, "it is nothing")


def test_likelihoods_that_differ(probe, monkeypatch):
    model = probe.build()
    assert "equal to" in correctness.likelihood_is_direct(model, probe)
    head = model.causal_lm.get_output_embeddings()
    inner = model.forward

    def other_head(*args, **kwargs):
        if kwargs.get("targets") is None:
            return inner(*args, **kwargs)
        with torch.no_grad():
            head.weight.mul_(1.01)
            found = inner(*args, **kwargs)
            head.weight.div_(1.01)
        return found

    monkeypatch.setattr(model, "forward", other_head)
    assert "likelihoods differ" in failed(lambda: correctness.likelihood_is_direct(model, probe)).found


def test_ranks_that_differ_or_do_not_answer(probe, monkeypatch):
    check = failed(lambda: correctness.two_ranks_are_one(probe, seconds=0.01))
    assert "did not end" in check.found
    assert "GLOO_SOCKET_IFNAME" in check.remedy

    def play(scale, own):
        def run(probe, folder, seconds):
            model = probe.build()
            whole = correctness.gradients(model, lambda: probe.objective.full_batch(model, probe.batch))
            torch.save({name: own * g for name, g in whole.items()}, folder / "own.pt")
            torch.save({name: scale * g for name, g in whole.items()}, folder / "averaged.pt")

        monkeypatch.setattr(correctness, "_run_ranks", run)

    play(1, 3)
    assert "equal to" in correctness.two_ranks_are_one(probe)
    play(2, 3)
    assert "another gradient" in failed(lambda: correctness.two_ranks_are_one(probe)).found
    play(3, 3)
    assert "did not average" in failed(lambda: correctness.two_ranks_are_one(probe)).found


# the table


def test_lines_fit_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    text = format_check(Check("something", False, "word " * 30, "do " * 40))
    assert all(len(part) <= 70 for part in text.splitlines())
    assert "to do: do" in text
    assert format_check(Check("x", True, "")).startswith("✓")
    assert format_check(Check("x", None, ""), "ascii").startswith("--")
    assert summary([Check("x", True, ""), Check("y", None, "")], 3.2, "ascii") == "1 ok, 0 NO, 1 -- in 3 s"


def test_a_check_that_falls_over_is_a_finding(monkeypatch):
    monkeypatch.delenv("ULLME_TRACEBACK", raising=False)
    check = run_check("it", lambda: 1 / 0)
    assert check.passed is False
    assert "ZeroDivisionError" in check.found
