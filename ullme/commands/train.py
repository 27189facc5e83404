"""The LightningCLI behind train.py: ``model:``, ``data:``, ``loss:``, ``checkpoint:`` and ``trainer:``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
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
from ullme.utils.allocator import keep_freed_memory
from ullme.utils.dotted_names import add_cwd_to_path
from ullme.utils.expanded_paths import expand_paths
from ullme.utils.messages import show_messages
from ullme.utils.precision import choose_precision, device_type, slow_choice, stored_dtype
from ullme.utils.wandb_login import check_wandb_login

DESCRIPTION = """Train an embedder: fit --config configs/base.yaml --config configs/model/phi-1.5.yaml ...
Configurations stack, and later ones win; every option can also be given on the command line. A run that was
interrupted (Ctrl-C and SIGTERM save first) goes on with the same command."""


class Trainer(L.Trainer):
    """Lightning's Trainer, whose ``precision`` may also be ``auto`` in a configuration.

    The CLI puts Lightning's own value in its place before it builds the trainer, so that the saved configuration says
    what was taken.
    """

    def __init__(self, *args: Any, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, precision=precision, **kwargs)  # type: ignore[arg-type]


class SamePrecision(L.Callback):
    """Refuses ranks for which ``precision: auto`` became different things: they would train different models."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises: ValueError: the ranks have different precisions."""
        half = str(trainer.precision).startswith("bf16")
        decisions = [trainer.strategy.reduce_boolean_decision(half, all=all_ranks) for all_ranks in (True, False)]
        if decisions[0] != decisions[1]:
            raise ValueError(
                "trainer.precision=auto: bfloat16 pays on some ranks' processors and not on others'; set "
                "trainer.precision=32-true and model.backbone.dtype=float32 for all of them"
            )


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder and logs the same configuration; ``validate`` leaves a run's own alone."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        config = resume.redacted(plain_values(self.parser, self.config))
        text = yaml.safe_dump(config, sort_keys=False)
        atomic_files.write_text(Path(trainer.default_root_dir) / resume.CONFIG_FILE, text)
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


def plain_values(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """A configuration as plain values, as YAML would give them."""
    return yaml.safe_load(parser.dump(config, skip_none=False))


class ULLMECLI(LightningCLI):
    """LightningCLI with one loss, one checkpoint callback, and all files of a run in one folder."""

    start_from: str | None = None
    precision_was_measured = False

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit and validate; evaluate.py is there for testing."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LossCallback, "loss", subclass_mode=True)
        parser.set_defaults({"loss": {"class_path": "ullme.callbacks.GradCache"}})
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        expand_paths(self.config)  # before any of its paths is used: Lightning expands only its own copy of one

    def before_instantiate_classes(self) -> None:
        """Check options that would fail later with a less helpful message. Raises: ValueError."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        trainer = config.trainer
        if trainer.gradient_clip_val is not None:
            raise ValueError(
                f"trainer.gradient_clip_val={trainer.gradient_clip_val}: GradCache clips after its last chunk; "
                "write model.optimizer.gradient_clip_val instead"
            )
        if self.subcommand == "validate":
            if config.data.val is None:
                raise ValueError("data.val is not set, so there is nothing to validate on; give --data.val BEIR_FOLDER")
            trainer.logger = False  # what is found is printed; the loggers of the training hold its metrics
        if config.data.val is None:  # Lightning refuses an interval longer than the epoch all the same
            trainer.val_check_interval = None
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: accumulation would split the "
                "in-batch negatives; raise data.batch_size instead, GradCache fits any batch into the memory of a chunk"
            )
        if self.subcommand:
            errors.check_accelerator(trainer)
            errors.check_strategy(trainer)
        folder, root = Path(config.checkpoint.dirpath), Path(trainer.default_root_dir)
        saved = resume.saved_config(folder, root, config.ckpt_path) if self.subcommand else {}
        self._choose_precision(config, saved)
        if self.subcommand == "fit" and not trainer.fast_dev_run:
            atomic_files.check_writable(root)
            if _is_first_rank():
                resume.lock_run_folder(root)
            now = plain_values(self._parser("fit"), config)
            self.start_from = resume.checkpoint_to_continue(folder, root, now, config.ckpt_path)
            if self.start_from:
                rank_zero_info(f"ullme: resuming from {self.start_from}")
            if _is_first_rank():
                _check_wandb_login(trainer.logger)
                resume.name_wandb_run(trainer.logger, root)

    def _choose_precision(self, config: Any, saved: dict[str, Any]) -> None:
        """Replace ``auto`` and log it; a resumed run keeps the precision that it was started with."""
        device = device_type(str(config.trainer.accelerator))
        keep_freed_memory(device)
        options = ("trainer.precision", "model.backbone.dtype")
        trainer, backbone = saved.get("trainer"), (saved.get("model") or {}).get("backbone")
        if trainer and backbone and "auto" in (asked := [config[option] for option in options]):
            for option, value in zip(options, (trainer.get("precision"), backbone.get("dtype", "auto")), strict=True):
                config[option] = value if config[option] == "auto" else config[option]
            if asked != [config[option] for option in options]:
                taken = ", ".join(f"{option}={config[option]}" for option in options)
                rank_zero_info(f"ullme: auto: {taken}, as the run was started")
        else:
            self.precision_was_measured = config.trainer.precision == "auto" and device == "cpu"
            if reason := resolve_precision(config, download=True):
                rank_zero_info(f"ullme: auto: {reason}")
        for option in options:
            if warning := slow_choice(option, config[option], device):
                rank_zero_warn(warning)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer. Raises: ValueError: a device, strategy or precision that this machine does not have."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            config = self.config[self.subcommand] if self.subcommand else self.config
            raise errors.explain_trainer_error(config.trainer.as_dict(), error) from error
        if self.precision_was_measured:
            trainer.callbacks.append(SamePrecision())  # type: ignore[attr-defined]
        return trainer

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
        """Keep Lightning from reading options out of the checkpoint; they come from the command line only."""


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


class FitCLI(ULLMECLI):
    """The CLI without the parsers of other subcommands: each takes a tenth of a second."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": ULLMECLI.subcommands()["fit"]}


class ValidateCLI(ULLMECLI):
    """As :class:`FitCLI`, for validate. (Both can be pickled, as ``strategy: ddp_spawn`` does.)"""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"validate": ULLMECLI.subcommands()["validate"]}


def build(argv: Sequence[str] | None = None, run: bool = True, kind: type[ULLMECLI] = ULLMECLI) -> ULLMECLI:
    """Build the CLI and, unless ``run`` is false, run its subcommand.

    Args:
        argv: arguments; None takes the command line's. With ``run=False`` they have no subcommand.
        run: whether to run the subcommand, or only to instantiate model, data and trainer.
        kind: the class of the CLI.
    """
    # Defaults below any config. The data module's sampler splits global batches over the ranks, not Lightning's.
    defaults: dict[str, Any] = {
        "use_distributed_sampler": False,
        "default_root_dir": "runs",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    given = sys.argv[1:] if argv is None else argv
    if kind is ULLMECLI and given:
        kind = {"fit": FitCLI, "validate": ValidateCLI}.get(given[0], kind)
    return kind(
        ULLMEModule,
        ULLMEDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        trainer_class=Trainer,
        trainer_defaults=defaults,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "train.py" if Path(sys.argv[0]).name == "train.py" else "ullme train",
            "description": DESCRIPTION,
            "exit_on_error": False,
            **{name: {"exit_on_error": False} for name in kind.subcommands()},
        },
        args=None if argv is None else config_files.locate_in_arguments(argv),
        run=run,
    )


def read_configs(arguments: Sequence[str], device: str | None = None) -> Any:
    """The configuration that train.py would run with, checked, nothing of it instantiated, ``auto`` precision replaced.

    Args:
        arguments: as train.py takes them, without a subcommand.
        device: "cpu" or "cuda", for which ``auto`` is replaced; None: where the trainer would run on this machine.

    Raises:
        ValueError, jsonargparse.ArgumentError: a mistake in it.
    """

    class Reader(ULLMECLI):
        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    arguments = config_files.locate_in_arguments(arguments)
    errors.check_config_files(arguments)
    config = build([*arguments, "--seed_everything=false"], run=False, kind=Reader).config
    resolve_precision(config, device)
    return config


def resolve_precision(config: Any, device: str | None = None, download: bool = False) -> str | None:
    """Replace ``auto`` in trainer.precision and model.backbone.dtype of a configuration.

    Args:
        config: as parsed; changed in place.
        device: "cpu" or "cuda"; None: where the trainer would run on this machine.
        download: the LLM's config.json from the hub, where it is needed and not on this machine.

    Returns:
        What was taken and why, in words; None where nothing was left to ``auto``, or nothing changed.
    """
    backbone = config.model.backbone
    chosen = choose_precision(
        config.trainer.precision,
        backbone.dtype,
        device or device_type(str(config.trainer.accelerator)),
        lambda: stored_dtype(backbone.model_name_or_path, download),
    )
    config.trainer.precision, backbone.dtype = chosen.precision, chosen.dtype
    return chosen.reason


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the command line. A mistake in the configuration ends with one line and exit status 2."""
    # Deprecations inside other libraries do not concern users.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # they are the command line's
    warnings.filterwarnings("ignore", "Experiment logs directory")  # earlier metrics are kept, see resume.keep_metrics
    add_cwd_to_path()
    show_messages("ullme.data")
    argv = config_files.locate_in_arguments(sys.argv[1:] if argv is None else argv)
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
        # Lightning exits with status 1 after a Ctrl-C during setup
        print(
            "Ctrl-C: stopped at once; the same command goes on from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, ArgumentError, MisconfigurationException, PermissionError) as error:
        if os.environ.get("ULLME_TRACEBACK"):
            raise
        reason = errors.explain_permission(error) if isinstance(error, PermissionError) else error
        hint = "; --help lists the options" if isinstance(error, ArgumentError) else ""
        print(f"error: {errors.one_line(reason)}{hint}\n(ULLME_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        resume.unlock_run_folders()
