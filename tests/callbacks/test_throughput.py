"""What Throughput logs, from real runs of train.py. Times cancel out of every comparison."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from test_training import arguments, logged  # noqa: F401

from ullme.callbacks import Throughput, throughput
from ullme.commands import train
from ullme.data import loader as loader_module
from ullme.data.datamodule import ResumableLoader
from ullme.engine.objective import Objective
from ullme.planning.devices import peak_tflops
from ullme.planning.flops import model_cost, step_work

SEEN: list = []


class Spy(L.Callback):
    """Keeps the batches of a run."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not batch_idx and not trainer.current_epoch:
            SEEN.clear()
        SEEN.append((batch, pl_module))


@pytest.fixture
def run(arguments, tmp_path):  # noqa: F811
    """Run three steps with these options; what was logged, column by column."""

    def make(*extra: str) -> dict[str, dict[int, float]]:
        spy = json.dumps([{"class_path": f"{__name__}.Spy"}])
        train.main(
            arguments(
                "run", "--trainer.max_steps=3", f"--trainer.callbacks={spy}", "--throughput.peak_tflops=2", *extra
            )
        )
        columns = ("tokens/s", "queries/s", "mfu", "padding", "waiting", "memory/peak_gib", "hours_left")
        return {column: logged(tmp_path / "run", column) for column in columns}

    return make


def tokens(batches) -> int:
    return sum(batch.num_tokens for batch in batches)


def test_rates_of_a_run(run):
    found = run()
    batches, module = [b for b, _ in SEEN], SEEN[0][1]
    assert len(batches) == 3
    for column, values in found.items():
        assert sorted(values) == [0, 1, 2], column
    cost = model_cost(module.model.causal_lm.config, module.model.options)
    for step, batch in enumerate(batches):
        rate = found["queries/s"][step]
        assert found["tokens/s"][step] / rate == pytest.approx(batch.num_tokens / 4, rel=1e-5)
        flops = cost.step(step_work(batch, Objective(module.loss.objective.terms), False, True)).item()
        assert found["mfu"][step] * 2e12 / rate == pytest.approx(flops / 4, rel=1e-5)
        assert found["padding"][step] == 0
        assert 0 < found["waiting"][step] < 1
        assert 0.05 < found["memory/peak_gib"][step] < 100
    seconds_a_step = found["hours_left"][1] * 3600 / 1
    assert seconds_a_step * found["queries/s"][1] == pytest.approx(4, rel=1e-5)
    assert found["hours_left"][2] == 0


def test_several_steps_are_one_window(run):
    found = run("--trainer.log_every_n_steps=3")
    assert list(found["tokens/s"]) == [2]
    ratio = found["tokens/s"][2] / found["queries/s"][2]
    assert ratio == pytest.approx(tokens(b for b, _ in SEEN) / 12, rel=1e-5)


def test_padding_of_a_padded_path_is_its_true_share(run):
    found = run("--model.backbone.attention_path=padded", "--loss.chunk_size=3")
    for step, (batch, _) in enumerate(SEEN):
        chunks = []
        for part in (slice(0, 3), slice(3, 4)):
            lengths = torch.cat([batch[part].queries.attention_mask.sum(1), batch[part].passages.attention_mask.sum(1)])
            chunks.append((lengths.sum().item(), len(lengths) * lengths.max().item()))
        real, computed = map(sum, zip(*chunks, strict=True))
        assert real < computed
        assert found["padding"][step] == pytest.approx(1 - real / computed, abs=1e-5)


def test_padding_counts_what_the_backbone_was_given(arguments, tmp_path, monkeypatch):  # noqa: F811
    """GRL on the padded path, against the blocks that really came in."""
    from ullme.models.ullme import ULLME

    given = []
    built = ULLME.__init__

    def watch(model, *args, **kwargs):
        built(model, *args, **kwargs)

        def note(module, args, kwargs):
            if torch.is_grad_enabled():
                mask = kwargs["attention_mask"]
                given.append((mask.sum().item(), mask.numel()))

        model.causal_lm.base_model.register_forward_pre_hook(note, with_kwargs=True)

    monkeypatch.setattr(ULLME, "__init__", watch)
    dropped = [a for a in arguments("run", "--loss=GRL", "--trainer.max_steps=1") if "chunk_size" not in a]
    train.main([*dropped, "--loss.chunk_size=3", "--model.backbone.attention_path=padded"])
    real, computed = map(sum, zip(*given, strict=True))
    assert logged(tmp_path / "run", "padding")[0] == pytest.approx(1 - real / computed, abs=1e-5)


def test_packed_rows_reach_the_layers_without_padding(arguments, tmp_path, monkeypatch):  # noqa: F811
    """GRL: what is counted as real is what comes into the first layer, token for token."""
    from ullme.models.attention.layers import decoder_layers
    from ullme.models.ullme import ULLME

    given, counted = [], []
    built, count = ULLME.__init__, Throughput._count

    def watch(model, *args, **kwargs):
        built(model, *args, **kwargs)

        def note(module, args, kwargs):
            if torch.is_grad_enabled():
                given.append((args[0] if args else kwargs["hidden_states"])[..., 0].numel())

        decoder_layers(model.causal_lm.base_model)[0].register_forward_pre_hook(note, with_kwargs=True)

    monkeypatch.setattr(ULLME, "__init__", watch)
    monkeypatch.setattr(Throughput, "_count", lambda *a: counted.append(count(*a)) or counted[-1])
    train.main(arguments("run", "--loss=GRL", "--loss.chunk_size=3", "--trainer.max_steps=1"))
    _, tokens, real, computed, _ = counted[0].tolist()
    assert sum(given) == real == computed > tokens
    assert logged(tmp_path / "run", "padding") == {0: 0}


def test_no_utilisation_where_the_peak_is_not_known(arguments, tmp_path):  # noqa: F811
    train.main(arguments("run", "--trainer.max_steps=1"))
    assert logged(tmp_path / "run", "tokens/s")
    assert not logged(tmp_path / "run", "mfu")


def test_the_folder_says_what_the_run_has_seen(run, tmp_path):
    run("--trainer.log_every_n_steps=2")
    seen = json.loads((tmp_path / "run" / "seen.json").read_text())
    assert (seen["queries"], seen["tokens"]) == (12, tokens(b for b, _ in SEEN))
    assert seen["seconds"] > 0


def test_what_was_seen_before_a_stop_counts(run, tmp_path):
    """Three steps; then, as if the run had been longer, three more from its last checkpoint."""
    run()
    before = json.loads((tmp_path / "run" / "seen.json").read_text())
    run("--trainer.max_steps=5", "--ckpt_path=last", "--trainer.max_epochs=-1")
    after = json.loads((tmp_path / "run" / "seen.json").read_text())
    assert after["queries"] == 20
    assert after["tokens"] > before["tokens"]
    assert after["seconds"] > before["seconds"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_count_all_queries(run, tmp_path):
    found = run("--trainer.devices=2", "--trainer.strategy=ddp_spawn")
    assert json.loads((tmp_path / "run" / "seen.json").read_text())["queries"] == 12
    assert found["hours_left"][1] * 3600 * found["queries/s"][1] == pytest.approx(4, rel=1e-5)
    assert 0 < found["waiting"][1] < 1


def test_time_in_validation_is_left_out(monkeypatch):
    now = 10.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    callback = Throughput()
    callback.on_validation_start(None, None)
    callback.on_validation_end(None, None)  # before training: nothing to correct
    callback.started = 4.0
    callback.on_validation_start(None, None)
    now = 15.0
    callback.on_validation_end(None, None)
    assert callback.started == 9.0


def test_the_loader_knows_how_long_it_was_waited_for(monkeypatch):
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(loader_module.time, "perf_counter", lambda: now)
    loader = ResumableLoader(range(4), batch_size=2, collate_fn=lambda items: work(5) or items)
    for batch in loader:
        assert len(batch) == 2
        work(100)  # on the batch; this is no waiting
    assert loader.waited == 2 * 5


def test_peaks_by_name():
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA L4") == 121
    assert peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("NVIDIA GeForce RTX 4090") == 165
    assert peak_tflops("Tesla V100-SXM2-16GB") is None
    with pytest.raises(ValueError, match="peak_tflops=0"):
        Throughput(peak_tflops=0)
