"""The LightningCLI behind train.py: ``model:``, ``data:``, ``loss:``, ``checkpoint:`` and ``trainer:``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from ullme.callbacks import LossCallback, Throughput
from ullme.data.datamodule import ULLMEDataModule
from ullme.distributed import leave
from ullme.module import ULLMEModule


class SaveConfig(SaveConfigCallback):
    """config.yaml in the run's folder, and the same to the logger."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=True, multifile=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())


class ULLMECLI(LightningCLI):
    """LightningCLI with one loss, one checkpoint policy, and everything of a run in one folder."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit and validate. Testing is evaluate.py's, so no parser is built for it."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LossCallback, "loss", subclass_mode=True)
        parser.set_defaults({"loss": {"class_path": "ullme.callbacks.GradCache"}})
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "step{step}"})
        parser.set_defaults({"checkpoint.auto_insert_metric_name": False})
        # Without a fixed folder `--ckpt_path last` would look for the last checkpoint of a run that just began.
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail later with somebody else's words. Raises: ValueError."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        trainer = config.trainer
        if trainer.gradient_clip_val is not None:
            raise ValueError(
                f"trainer.gradient_clip_val={trainer.gradient_clip_val}: GradCache clips after its last chunk; "
                "write model.optimizer.gradient_clip_val instead"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: accumulation would take the "
                "negatives apart; raise data.batch_size instead, GradCache fits any batch into the memory of a chunk"
            )
        path = config.get("ckpt_path")
        if path not in (None, "best", "last", "hpc") and not os.path.isfile(path):
            raise ValueError(f"ckpt_path={path!r}: no such file; give a .ckpt file, or last")


def _checkpoint_folder(root: str | None) -> str:
    return os.path.join(root or "runs", "checkpoints")


def build(argv: Sequence[str] | None = None, run: bool = True) -> ULLMECLI:
    """The CLI, run or only instantiated.

    Args:
        argv: arguments; None takes the command line's. With ``run=False`` there is no subcommand among them.
        run: whether to run the subcommand.
    """
    # Defaults below any config. The sampler cuts global batches itself, so Lightning must not put in its own.
    defaults: dict[str, Any] = {
        "use_distributed_sampler": False,
        "max_epochs": 1,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "callbacks": [Throughput()],
    }
    return ULLMECLI(
        ULLMEModule,
        ULLMEDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        trainer_defaults=defaults,
        auto_configure_optimizers=False,
        args=None if argv is None else list(argv),
        run=run,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the command line. A mistake in the configuration ends with one line and exit status 2."""
    # Deprecations inside other libraries are no business of who trains a model.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        build(argv)
        leave()
    except ValueError as error:
        if os.environ.get("ULLME_TRACEBACK"):
            raise
        print(f"error: {error}\n(ULLME_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error
