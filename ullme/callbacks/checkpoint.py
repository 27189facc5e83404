"""When a run saves checkpoints, which ones are kept, and how it stops on a signal."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ullme.training.resume import FINISHED
from ullme.training.signals import ShutdownSignal
from ullme.utils import atomic_files

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
STOPPED_FILE = "stopped_after_step{}.json"  # in the run folder
METRICS_KEY = "ullme_metrics"  # in a checkpoint: the metrics that callbacks see


class Checkpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` and, with a validation, the best checkpoints by the validation metric.

    ``last.ckpt`` is saved at the given interval of steps, epochs or time, before and after each validation, at the end,
    and after the step during which SIGTERM or Ctrl-C came. A run that resumes from any of them continues as if it had
    not been interrupted.

    Args:
        dirpath: folder of the checkpoints; null means ``checkpoints`` in trainer.default_root_dir.
        filename: of the checkpoints other than ``last.ckpt``; with a metric, it gets the prefix ``best-``.
        monitor: validation metric by which checkpoints are ranked; ignored without validation.
        mode: whether the best checkpoint has the max or the min of the metric.
        save_top_k: number of best checkpoints to keep, or without validation of newest ones (at most 1); 0 for none;
            -1 keeps all.
        every_n_train_steps: save every so many steps.
        every_n_epochs: save every so many epochs; 1 unless another interval is given.
        train_time_interval: save after this much time.
        stop_after_step: save and stop after the first validation at this step or later (without validation: after this
            step), with the exit status of SIGTERM, 143. ``stopped_after_stepN.json`` in the run folder then has the
            metric. The same command without this option goes on, with the schedule as it was.

    Raises:
        ValueError: save_top_k below -1, or an interval or stop_after_step below 1.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "step{step}",
        monitor: str | None = "val/ndcg@10",
        mode: str = "max",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        stop_after_step: int | None = None,
    ) -> None:
        for name, value, least in (
            ("save_top_k", save_top_k, -1),
            ("every_n_train_steps", every_n_train_steps, 1),
            ("every_n_epochs", every_n_epochs, 1),
            ("stop_after_step", stop_after_step, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"checkpoint.{name}={value} must be at least {least}")
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoint.mode={mode!r}: choose max or min")
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,  # a resumed run writes the same files again
        )
        # Set here, since ModelCheckpoint accepts only one of them.
        other = every_n_train_steps is not None or train_time_interval is not None
        self._every_n_train_steps = every_n_train_steps or 0
        self._every_n_epochs = every_n_epochs or (0 if other else 1)
        self._train_time_interval = train_time_interval
        self._stop_after_step = stop_after_step
        self._due = self._before_validation = False
        self._metrics: dict[str, Tensor] = {}
        self._shutdown = ShutdownSignal()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Decide whether checkpoints are ranked. Raises: ValueError: save_top_k above 1 without a validation metric."""
        validates = getattr(trainer.datamodule, "val", None) is not None and trainer.limit_val_batches != 0  # type: ignore[attr-defined]
        if self.save_top_k < 1 or not validates:
            self.monitor = None
        if self.monitor is None and self.save_top_k > 1:
            raise ValueError(
                f"checkpoint.save_top_k={self.save_top_k} without a validation metric: give data.val and "
                "checkpoint.monitor, or choose 1 (the newest), 0 (none) or -1 (all)"
            )
        if self.monitor is not None and not str(self.filename).startswith("best-"):
            self.filename = f"best-{self.filename}"
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero and stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            atomic_files.sweep(str(self.dirpath))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer._logger_connector._callback_metrics.update(
            {name: value.to(pl_module.device) for name, value in self._metrics.items()}
        )
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(str(self.dirpath), FINISHED).unlink(missing_ok=True)
        self._shutdown = ShutdownSignal()
        self._shutdown.install_handlers(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; if a validation follows at once, it saves instead."""
        every = self._every_n_train_steps
        self._due = (every > 0 and trainer.global_step % every == 0) or self._time_is_up(trainer)
        # At max_steps, save now: a run that resumes with more steps from a checkpoint of on_train_epoch_end would skip
        # the rest of the epoch.
        self._due |= trainer.global_step == trainer.max_steps
        leave = self._asked_to_leave(trainer)
        if _validation_follows(trainer):
            return
        if self.monitor is None and self._reached_last_step(trainer):
            leave = True
            self._stop(trainer)
        if self._due or leave:
            self._save(trainer, ranked=self.monitor is None and self._due)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save before the validation, so that a run that is killed in it resumes with the validation."""
        if self._may_save(trainer):
            self._before_validation = True
            self._save(trainer, ranked=False)
            self._before_validation = False

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._may_save(trainer):
            self._asked_to_leave(trainer)  # saved when the validation began

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._may_save(trainer):
            return
        every = self._every_n_epochs
        due = self._due or (every > 0 and (trainer.current_epoch + 1) % every == 0)
        if self._reached_last_step(trainer):
            self._stop(trainer)
        self._save(trainer, ranked=due if self.monitor is None else self.monitor in trainer.callback_metrics)
        self._due = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        every = self._every_n_epochs
        if (
            every > 0
            and (trainer.current_epoch + 1) % every == 0
            and self._last_global_step_saved != trainer.global_step
        ):
            self._save(trainer, ranked=self.monitor is None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._may_save(trainer) and self._last_global_step_saved != trainer.global_step:
            self._save(trainer, ranked=self.monitor is None)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the run as finished, so that it is not started again by mistake."""
        if self._may_save(trainer) and trainer.is_global_zero:
            note = f"{trainer.global_step} steps\n"
            atomic_files.write_text(Path(str(self.dirpath), FINISHED), note)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best checkpoints so far, also if the run folder was moved or copied since."""
        super().load_state_dict(_in_folder(state_dict, Path(str(self.dirpath))))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the metrics for the start of training."""
        self._metrics = dict(checkpoint.get(METRICS_KEY, {}))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the latest metrics, which callbacks of a resumed run may ask for before the next validation; and mark
        Lightning's validation loop as in progress if a resumed run must begin with a validation, else as done.

        Lightning's own counts stay in progress after a validation was resumed.
        """
        checkpoint[METRICS_KEY] = {
            name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()
        }
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        done = progress["total"]["completed"]
        progress["total"].update(ready=done, started=done, processed=done, completed=done)
        if self._before_validation:
            progress["current"].update(ready=0, started=0, processed=0, completed=0)
            progress["total"].update(ready=done + 1, started=done + 1)

    def _save(self, trainer: L.Trainer, ranked: bool) -> None:
        """Save ``last.ckpt`` and, if ``ranked``, a checkpoint among the best or newest."""
        if not self._may_save(trainer):
            return
        values = self._monitor_candidates(trainer)
        if ranked:
            self._save_topk_checkpoint(trainer, values)
        self._save_last_checkpoint(trainer, values)
        self._last_time_checked = time.monotonic()

    @staticmethod
    def _may_save(trainer: L.Trainer) -> bool:
        """Whether this is training, and neither the sanity check nor fast_dev_run."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        return fitting and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _time_is_up(self, trainer: L.Trainer) -> bool:
        """Whether train_time_interval has passed, as rank 0 measures it."""
        if self._train_time_interval is None:
            return False
        waited = time.monotonic() - (self._last_time_checked or 0)
        return trainer.strategy.broadcast(waited >= self._train_time_interval.total_seconds())

    def _asked_to_leave(self, trainer: L.Trainer) -> bool:
        """Whether any rank was; then Lightning makes all of them leave as soon as this step is logged."""
        leave = self._shutdown.received_by_any_rank(trainer)
        trainer._signal_connector.received_sigterm |= leave
        return leave

    def _reached_last_step(self, trainer: L.Trainer) -> bool:
        return self._stop_after_step is not None and trainer.global_step >= self._stop_after_step

    def _stop(self, trainer: L.Trainer) -> None:
        """Write the metric down; Lightning then makes all ranks leave as after SIGTERM, once this step is saved."""
        if trainer.is_global_zero:
            value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
            note = {
                "step": trainer.global_step,
                "monitor": self.monitor,
                "value": None if value is None else float(value),
            }
            place = Path(trainer.default_root_dir) / STOPPED_FILE.format(self._stop_after_step)
            atomic_files.write_text(place, json.dumps(note))
        self._shutdown.name = f"checkpoint.stop_after_step={self._stop_after_step}"
        trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """On a signal, print how to resume, and exit with the status of a process that the signal ended."""
        if isinstance(exception, SIGTERMException):
            exception.code = self._shutdown.status
            if trainer.is_global_zero:
                saved = f"saved {self.last_model_path} after step {self._last_global_step_saved}"
                self._shutdown.announce(saved)


def _in_folder(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state with its files in ``folder``, if they are all there."""
    here = {name: str(folder / Path(name).name) for name in state.get("best_k_models", {})}
    if state.get("dirpath") == str(folder) or not here or not all(map(os.path.isfile, here.values())):
        return state
    paths = {key: str(folder / Path(state[key]).name) for key in _PATHS if state.get(key)}
    return {
        **state,
        **paths,
        "dirpath": str(folder),
        "best_k_models": {here[k]: v for k, v in state["best_k_models"].items()},
    }


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation runs right after this step."""
    loop = trainer.fit_loop
    batches = trainer.num_val_batches
    if not (sum(batches) if isinstance(batches, list) else batches):
        return False
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
