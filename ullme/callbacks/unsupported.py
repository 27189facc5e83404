"""Lightning's own callbacks: which do not work here and why, and what the others need."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import lightning as L
from lightning.pytorch import callbacks

from ullme.callbacks.checkpoint import Checkpoint

# Callback -> (why it is refused, what to do). Subclasses are refused with it.
UNSUPPORTED: dict[type[L.Callback], tuple[str, str]] = {
    callbacks.StochasticWeightAveraging: (
        "it copies the weights before the LLM is built, so it would average nothing, and replaces the schedule",
        "average the adapters of several checkpoints after training",
    ),
    callbacks.WeightAveraging: (
        "its checkpoints hold the frozen LLM too, and a run cannot be resumed from them",
        "average the adapters of several checkpoints after training",
    ),
    callbacks.LearningRateFinder: (
        "it needs automatic optimization, and GradCache steps the optimizer itself",
        "set model.optimizer.lr, by short runs with trainer.max_steps",
    ),
    callbacks.BatchSizeFinder: (
        "in-batch negatives make the batch size a part of the loss",
        "set data.batch_size, and loss.chunk_tokens=auto for what fits into memory",
    ),
    callbacks.GradientAccumulationScheduler: (
        "accumulation would split the in-batch negatives",
        "raise data.batch_size, GradCache fits any batch into the memory of a chunk",
    ),
    callbacks.BaseFinetuning: (
        "it freezes layers before the LLM is built",
        "choose what is trained with model.backbone",
    ),
    callbacks.SpikeDetection: (
        "it cannot load the state that it saves (Lightning 2.6), so a run could not be resumed",
        "look at train/grad_norm; a loss that is not finite stops the run anyway",
    ),
    callbacks.ModelPruning: (
        "it renames the weights, so that checkpoints fit no model",
        "prune the LLM before training",
    ),
}
_NEED_A_LOGGER = (callbacks.LearningRateMonitor, callbacks.DeviceStatsMonitor, callbacks.ThroughputMonitor)
_OTHER_METRICS = ("lr", "epoch", "step")
VALIDATION_METRICS = ("val/ndcg@10", "val/mrr@10", "val/recall@100")
# Mode -> the metrics of which it would take the worst for the best. min is what Lightning's callbacks begin with.
_WRONG_MODE: dict[str, tuple[str, ...]] = {"min": VALIDATION_METRICS, "max": ("train/loss",)}


def check_callbacks(trainer: L.Trainer, data: L.LightningDataModule | None) -> None:
    """Check, before the LLM is loaded, that every callback can do its work.

    Args:
        trainer: with all callbacks.
        data: the data module of the run.

    Raises:
        ValueError: one is not supported, needs a logger and has none, or monitors a metric that is never logged, or the
            wrong way round.
    """
    found: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in found:
        name = f"trainer.callbacks: {type(callback).__name__}"
        for kind, (reason, remedy) in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise ValueError(f"{name} is not supported: {reason}; leave it out, and {remedy}")
        if isinstance(callback, _NEED_A_LOGGER) and not trainer.loggers:
            raise ValueError(f"{name} needs a logger, and trainer.logger=false; leave it out, or give a logger")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    validates = getattr(data, "val", None) is not None and trainer.limit_val_batches != 0
    own_callbacks = any(not type(c).__module__.startswith(("lightning.", "ullme.")) for c in found)
    for callback, owner, metric in _monitors(found):
        if metric in VALIDATION_METRICS:
            if not validates and not isinstance(callback, Checkpoint):
                raise ValueError(f"{owner}={metric!r} needs a validation; give a BEIR folder as data.val")
        # A callback of the user's own may log what it likes.
        elif not own_callbacks and not metric.startswith("train/") and metric not in _OTHER_METRICS:
            raise ValueError(_unknown(owner, metric, VALIDATION_METRICS))
        mode = str(getattr(callback, "mode", None))
        if metric in _WRONG_MODE.get(mode, ()):
            better = "max" if mode == "min" else "min"
            raise ValueError(
                f"{owner}={metric!r} with mode={mode} takes the worst value for the best; set its mode to {better}"
            )


def check_monitors_of_training(trainer: L.Trainer) -> None:
    """Check after the first step that the metrics of the training that callbacks monitor were logged.

    Raises:
        ValueError: one was not.
    """
    known = [name for name in trainer.callback_metrics if not name.startswith("val/")]
    for _, owner, metric in _monitors(trainer.callbacks):  # type: ignore[attr-defined]
        if metric.startswith("train/") and metric not in known:
            raise ValueError(_unknown(owner, metric, known))


def _monitors(found: Iterable[L.Callback]) -> list[tuple[L.Callback, str, str]]:
    """(callback, its option, metric) of every callback that depends on a metric."""
    return [
        (c, "checkpoint.monitor" if isinstance(c, Checkpoint) else f"trainer.callbacks: {type(c).__name__}.monitor", m)
        for c in found
        if isinstance(c, callbacks.EarlyStopping | callbacks.ModelCheckpoint) and (m := c.monitor) is not None
    ]


def _unknown(owner: str, metric: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(metric, list(known), n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(sorted(known))}"
    return f"{owner}={metric!r} is not logged in this run; {advice}"
