"""Every callback that Lightning ships: it works, also in a run that was killed and resumed, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme.callbacks import Checkpoint
from ullme.callbacks.unsupported import UNSUPPORTED, check_callbacks
from ullme.commands import train
from ullme.training.module import ULLMEModule
from ullme.utils import atomic_files

REFUSED = {
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.01),
    "WeightAveraging": callbacks.WeightAveraging,
    "EMAWeightAveraging": callbacks.EMAWeightAveraging,
    "LearningRateFinder": callbacks.LearningRateFinder,
    "BatchSizeFinder": callbacks.BatchSizeFinder,
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 2}),
    "BaseFinetuning": callbacks.BaseFinetuning,
    "BackboneFinetuning": callbacks.BackboneFinetuning,
    "SpikeDetection": callbacks.SpikeDetection,
    "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured"),
}
# Of the others each does its work in the runs below, but for the bases, which do nothing by themselves.
WORKING = {
    "DeviceStatsMonitor": lambda _: callbacks.DeviceStatsMonitor(cpu_stats=False),
    "EarlyStopping": lambda _: EarlyStopping("val/ndcg@10", patience=50, mode="max", min_delta=2.0),
    "LambdaCallback": lambda _: LambdaCallback(on_train_epoch_end=lambda *_: None),
    "LearningRateMonitor": lambda _: callbacks.LearningRateMonitor("step"),
    "ModelCheckpoint": lambda folder: ModelCheckpoint(
        folder / "own", "{step}", monitor="train/loss", save_top_k=2, enable_version_counter=False
    ),
    "ModelSummary": lambda _: callbacks.ModelSummary(),
    "OnExceptionCheckpoint": lambda folder: callbacks.OnExceptionCheckpoint(folder / "own", "exception"),
    "ThroughputMonitor": lambda _: callbacks.ThroughputMonitor(batch_size_fn=len, window_size=2),
    "Timer": lambda _: callbacks.Timer(duration={"hours": 1}),
}
NOT_BY_THEMSELVES = {"Callback", "Checkpoint", "BasePredictionWriter", "ProgressBar"}
BARS = {"TQDMProgressBar", "RichProgressBar", "RichModelSummary"}  # what a terminal shows; one of them at a time


class Killed(BaseException):
    pass


@pytest.fixture
def fit(arguments, tmp_path, monkeypatch):  # noqa: F811
    """Run with all working callbacks; two epochs of 6 steps, validated at the ends of both."""

    def run(name: str, log: str, *extra: str, killed: str = "", only: tuple[str, ...] = ()) -> dict[str, dict]:
        options = ["--trainer.max_epochs=2", f"--trainer.logger.save_dir={tmp_path / log}", *extra]
        cli = train.build(arguments(name, *options)[1:], run=False)
        folder = tmp_path / name
        own = [make(folder) for kind, make in WORKING.items() if not only or kind in only]
        cli.trainer.callbacks[:0] = own
        saved = atomic_files.newest_first(folder / "checkpoints")
        with monkeypatch.context() as patch:
            if killed == "after the validation":
                patch.setattr(EarlyStopping, "on_train_epoch_end", _kill)
            elif killed:
                step = ULLMEModule.training_step
                limit = int(killed.removeprefix("in step "))
                patch.setattr(
                    ULLMEModule,
                    "training_step",
                    lambda self, *rest: _kill() if self.global_step == limit else step(self, *rest),
                )
            if killed:
                with pytest.raises(Killed):
                    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            else:
                cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=saved[0] if saved else None)
        return {type(callback).__name__: callback.state_dict() for callback in own}

    return run


def _kill(*_):
    raise Killed


def test_the_table_names_every_callback_of_lightning():
    assert {*REFUSED, *WORKING, *NOT_BY_THEMSELVES, *BARS} == set(callbacks.__all__)


@pytest.mark.parametrize("killed", [pytest.param("after the validation", marks=pytest.mark.slow), "in step 8"])
def test_callbacks_go_on_where_the_run_was_killed(fit, tmp_path, killed):
    whole = fit("whole", "whole")
    fit("run", "first", killed=killed)
    assert (tmp_path / "run" / "own" / "exception.ckpt").is_file()
    resumed = fit("run", "second")
    assert whole["EarlyStopping"]["wait_count"] == 1  # never better by 2.0 than the first validation
    assert resumed["EarlyStopping"] == whole["EarlyStopping"]
    names = [{Path(path).name for path in state["ModelCheckpoint"]["best_k_models"]} for state in (whole, resumed)]
    assert len(names[0]) == 2
    assert names[0] == names[1]
    logs = {**logged(tmp_path / "first", "train/loss"), **logged(tmp_path / "second", "train/loss")}
    assert logs == logged(tmp_path / "whole", "train/loss")
    rates = logged(tmp_path / "whole", "lr-AdamW")
    assert {**logged(tmp_path / "first", "lr-AdamW"), **logged(tmp_path / "second", "lr-AdamW")} == rates
    assert len(set(rates.values())) > 6
    elapsed = [state["Timer"]["time_elapsed"]["train"] for state in (whole, resumed)]
    assert min(elapsed) > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_callbacks_that_cannot_work_are_refused(kind):
    trainer = SimpleNamespace(callbacks=[REFUSED[kind]()], loggers=[object()], fast_dev_run=False, limit_val_batches=1)
    with pytest.raises(ValueError, match=rf"trainer\.callbacks: {kind} is not supported: .*; leave it out, and \w+"):
        check_callbacks(trainer, None)
    assert any(issubclass(getattr(callbacks, kind), base) for base in UNSUPPORTED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/ndcg_at_10"],
            "EarlyStopping.monitor='val/ndcg_at_10' is not logged in this run; did you mean val/ndcg@10?",
        ),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/mrr@10", "--data.val=null"],
            "EarlyStopping.monitor='val/mrr@10' needs a validation; give a BEIR folder as data.val",
        ),
        (["--checkpoint.monitor=ndcg@10"], "checkpoint.monitor='ndcg@10' is not logged"),
        (["--trainer.callbacks=LearningRateMonitor", "--trainer.logger=false"], "LearningRateMonitor needs a logger"),
        (["--trainer.callbacks=LearningRateFinder"], "LearningRateFinder is not supported"),
        (["--trainer.strategy=deepspeed_stage_2"], "strategy=deepspeed_stage_2: DeepSpeed averages gradients in every"),
    ],
)
def test_they_are_refused_before_the_llm_is_loaded(arguments, tmp_path, capsys, monkeypatch, options, message):  # noqa: F811
    monkeypatch.setattr(ULLMEModule, "configure_model", _kill)
    logger = [o for o in arguments("run") if "trainer.logger" in o] if "--trainer.logger=false" in options else []
    with pytest.raises(SystemExit) as end:
        train.main([one for one in arguments("run", *options) if one not in logger])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt"))


def test_a_misspelt_metric_of_the_training_stops_after_the_first_step(arguments, capsys):  # noqa: F811
    stop = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=train/infonce"]
    with pytest.raises(SystemExit) as end:
        train.main(arguments("run", *stop))
    assert end.value.code == 2
    assert "train/infonce' is not logged in this run; did you mean train/info_nce?" in capsys.readouterr().err


def test_a_callback_of_ones_own_may_log_what_others_monitor(monkeypatch):
    own = type("Own", (callbacks.Callback,), {"__module__": "mine"})()
    stop = EarlyStopping("val/mine")
    trainer = SimpleNamespace(callbacks=[stop, own], loggers=[], fast_dev_run=False, limit_val_batches=1)
    check_callbacks(trainer, None)
    trainer.callbacks = [stop]
    with pytest.raises(ValueError, match="val/mine"):
        check_callbacks(trainer, None)


@pytest.mark.parametrize(
    ("callback", "better"),
    [
        (EarlyStopping("val/ndcg@10"), "max"),  # min is Lightning's default
        (ModelCheckpoint(monitor="val/mrr@10"), "max"),
        (Checkpoint(monitor="train/loss"), "min"),  # max is ours
        (EarlyStopping("val/recall@100", mode="max"), None),
        (EarlyStopping("train/loss"), None),
    ],
)
def test_the_worst_is_not_taken_for_the_best(callback, better):
    trainer = SimpleNamespace(callbacks=[callback], loggers=[], fast_dev_run=False, limit_val_batches=1)
    data = SimpleNamespace(val="beir")
    if better is None:
        check_callbacks(trainer, data)
    else:
        with pytest.raises(ValueError, match=f"takes the worst value for the best; set its mode to {better}"):
            check_callbacks(trainer, data)


def best_state(file: Path) -> dict:
    return next(s for s in atomic_files.read(file)["callbacks"].values() if s.get("best_k_models"))


def test_the_best_checkpoint_is_known_in_a_copied_folder(fit, tmp_path):
    """Copied and resumed elsewhere, the run compares with its best so far, and keeps one best checkpoint."""
    fit("run", "first", "--trainer.max_epochs=1", only=("Timer",))
    (tmp_path / "run").rename(tmp_path / "moved")
    last = tmp_path / "moved" / "checkpoints" / "last.ckpt"
    before = best_state(last)["best_model_score"]
    fit("moved", "second", "--trainer.max_epochs=2", only=("Timer",))
    (best,) = last.parent.glob("best-*.ckpt")
    state = best_state(last)
    assert [str(best)] == list(state["best_k_models"])
    assert state["best_model_score"] >= before
