"""The LightningCLI behind train.py: ``model:``, ``data:``, ``loss:``, ``checkpoint:`` and ``trainer:``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from ullme.callbacks import LossCallback, Throughput
from ullme.callbacks.checkpoint import Checkpoint
from ullme.callbacks.unsupported import check_callbacks
from ullme.data.datamodule import ULLMEDataModule
from ullme.distributed import leave_process_group
from ullme.training import resume
from ullme.training.module import ULLMEModule
from ullme.training.signals import INTERRUPTED
from ullme.utils import atomic_files, config_files, errors
from ullme.utils.dotted_names import look_here
from ullme.utils.wandb_login import check_wandb_login

DESCRIPTION = """Train an embedder: fit --config configs/base.yaml --config configs/model/phi-1.5.yaml ...
Configurations stack, and later ones win; every option can be given on the command line too. A run that was interrupted
(Ctrl-C and SIGTERM save first) goes on with the same command."""


class SaveConfig(SaveConfigCallback):
    """config.yaml in the run's folder, and the same to the logger."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        config = resume.redacted(plain(self.parser, self.config))
        text = yaml.safe_dump(config, sort_keys=False)
        atomic_files.write_atomically(
            Path(trainer.default_root_dir) / resume.CONFIG_FILE, lambda f: f.write(text.encode())
        )
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


def plain(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """A configuration as it would be read from YAML."""
    return yaml.safe_load(parser.dump(config, skip_none=False))


class ULLMECLI(LightningCLI):
    """LightningCLI with one loss, one checkpoint policy, and everything of a run in one folder."""

    start_from: str | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit and validate. Testing is evaluate.py's, so no parser is built for it."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LossCallback, "loss", subclass_mode=True)
        parser.set_defaults({"loss": {"class_path": "ullme.callbacks.GradCache"}})
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
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
        if self.subcommand:
            errors.check_accelerator(trainer)
            errors.check_strategy(trainer)
        if self.subcommand == "fit" and not trainer.fast_dev_run:
            folder, root = Path(config.checkpoint.dirpath), Path(trainer.default_root_dir)
            atomic_files.check_writable(root)
            if _is_first_rank():
                resume.lock_run_folder(root)
            now = plain(self._parser("fit"), config)
            self.start_from = resume.checkpoint_to_continue(folder, root, now, config.ckpt_path)
            if self.start_from:
                rank_zero_info(f"ullme: going on from {self.start_from}")
            if _is_first_rank():
                _check_wandb_login(trainer.logger)
                resume.name_wandb_run(trainer.logger, root)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Raises: ValueError: a device, strategy or precision that is not there."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            config = self.config[self.subcommand] if self.subcommand else self.config
            raise errors.bad_trainer(config.trainer.as_dict(), error) from error

    def _set_seed(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        errors.check_empty_options(self._parser(self.subcommand), config)
        seed = config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything={seed}: must be from 0 to {2**32 - 1}")
        super()._set_seed()

    def after_instantiate_classes(self) -> None:
        """Check the callbacks, set old logs aside, and pass on where the run starts. Raises: ValueError."""
        if self.subcommand == "fit":
            check_callbacks(self.trainer, self.datamodule)
        if self.subcommand == "fit" and _is_first_rank():
            resume.keep_metrics(logger.log_dir for logger in self.trainer.loggers if isinstance(logger, CSVLogger))
        if self.start_from is not None:
            self.config_init[self.subcommand]["ckpt_path"] = self.start_from

    def _parse_ckpt_path(self) -> None:
        """Lightning would read options from the checkpoint here; ours come from the command line alone."""


def _is_first_rank() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning keeps it on the decorator


def _check_wandb_login(logger: Any) -> None:
    """Raises: ValueError: a logger of W&B is configured, and nobody is logged in."""
    for one in logger if isinstance(logger, list) else [logger]:
        path, options = getattr(one, "class_path", ""), getattr(one, "init_args", None) or {}
        if path.endswith("WandbLogger") and not options.get("offline") and options.get("mode") in (None, "online"):
            check_wandb_login(f"trainer.logger={path.rpartition('.')[2]}")


def _checkpoint_folder(root: str) -> str:
    return os.path.join(root, "checkpoints")


def _with_one_subcommand(kind: type[ULLMECLI], argv: Sequence[str] | None) -> type[ULLMECLI]:
    """``kind`` without the parsers of the subcommands that are not asked for: each takes a tenth of a second."""
    every = kind.subcommands()
    if not argv or argv[0] not in every:
        return kind
    only = {argv[0]: every[argv[0]]}
    return type(kind.__name__, (kind,), {"subcommands": staticmethod(lambda: only)})


def build(argv: Sequence[str] | None = None, run: bool = True, kind: type[ULLMECLI] = ULLMECLI) -> ULLMECLI:
    """The CLI, run or only instantiated.

    Args:
        argv: arguments; None takes the command line's. With ``run=False`` there is no subcommand among them.
        run: whether to run the subcommand.
        kind: which CLI.
    """
    # Defaults below any config. The sampler cuts global batches itself, so Lightning must not put in its own.
    defaults: dict[str, Any] = {
        "use_distributed_sampler": False,
        "default_root_dir": "runs",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    kind = _with_one_subcommand(kind, sys.argv[1:] if argv is None else argv)
    return kind(
        ULLMEModule,
        ULLMEDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        trainer_defaults=defaults,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "train.py" if Path(sys.argv[0]).name == "train.py" else "ullme train",
            "description": DESCRIPTION,
            "exit_on_error": False,
            **{name: {"exit_on_error": False} for name in kind.subcommands()},
        },
        args=None if argv is None else config_files.located(argv),
        run=run,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the command line. A mistake in the configuration ends with one line and exit status 2."""
    # Deprecations inside other libraries are no business of who trains a model.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # they are the command line's
    look_here()
    argv = config_files.located(sys.argv[1:] if argv is None else argv)
    try:
        errors.check_config_files(argv)
        build(argv)
        leave_process_group()
    except SIGTERMException:
        leave_process_group()
        raise
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        # Lightning makes status 1 of one that came while it was setting up
        print(
            "Ctrl-C: left at once; the same command goes on from the last checkpoint, if there is one", file=sys.stderr
        )
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, ArgumentError, MisconfigurationException) as error:
        if os.environ.get("ULLME_TRACEBACK"):
            raise
        hint = "; --help lists the options" if isinstance(error, ArgumentError) else ""
        print(f"error: {errors.one_line(error)}{hint}\n(ULLME_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        resume.unlock_run_folders()
