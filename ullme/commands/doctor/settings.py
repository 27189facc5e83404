"""Checks of a configuration on this machine: LLM, memory, disk, run folder, data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.commands.doctor.checks import CheckFailed, NotChecked
from ullme.commands.doctor.machine import GIB, free_disk

if TYPE_CHECKING:
    from ullme.models.config import BackboneConfig
    from ullme.planning.plan import Job, Plan

# Rows of each file that are checked.
_ROWS = 100


class Settings:
    """The checks of one configuration of train.py.

    Args:
        config: as read and checked by :func:`ullme.commands.train.read_configs`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.root = Path(config.trainer.default_root_dir)

    @cached_property
    def options(self) -> BackboneConfig:
        from ullme.models.config import BackboneConfig

        return BackboneConfig(**self.config.model.backbone.as_dict())

    @cached_property
    def job(self) -> Job:
        """What to plan for. Raises: ValueError: the LLM's config.json cannot be loaded, or an option is wrong."""
        from ullme.commands.plan import job_from_config, parser

        arguments = parser().parse_args([f"--rows={self.config.data.batch_size}"])  # only memory is asked for
        return job_from_config(self.config, arguments)

    @cached_property
    def is_local(self) -> bool:
        """Whether the LLM's weights are on this machine."""
        from huggingface_hub import try_to_load_from_cache

        name = self.options.model_name_or_path
        files = ("model.safetensors", "model.safetensors.index.json")
        return Path(name).is_dir() or any(isinstance(try_to_load_from_cache(name, file), str) for file in files)

    @property
    def logs_to_wandb(self) -> bool:
        """Whether a logger sends to W&B's server."""
        logger = self.config.trainer.logger
        loggers = logger if isinstance(logger, list) else [logger]
        return any(
            str(getattr(one, "class_path", "")).endswith("WandbLogger") and not one.init_args.get("offline")
            for one in loggers
        )

    def trainer(self) -> str:
        """Raises: ValueError: a strategy that does not fit the devices."""
        from ullme.utils.errors import check_strategy

        trainer = self.config.trainer
        check_strategy(trainer)
        strategy = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
        return f"{trainer.devices} x {trainer.accelerator}, strategy {strategy}, precision {trainer.precision}"

    def precision(self) -> str:
        """Raises: NotChecked: on a GPU; CheckFailed: an option that makes this CPU many times slower than float32."""
        from ullme.commands.doctor.machine import precision

        chosen = {name: self.config[name] for name in ("trainer.precision", "model.backbone.dtype")}
        return precision(str(self.config.trainer.accelerator), chosen)

    def backbone(self) -> str:
        """Raises: ValueError, CheckFailed: there is no such LLM; NotChecked: it is not downloaded yet."""
        from huggingface_hub import constants

        name, plan = self.options.model_name_or_path, self.plan
        size = f"{self.job.config.model_type}, {plan.weights / 1e9:.2f} B weights, {plan.trained / 1e6:.1f} M trained"
        if not self.is_local and constants.HF_HUB_OFFLINE:
            raise CheckFailed(f"{name} is not on this machine, and HF_HUB_OFFLINE is set", "unset it, or name a folder")
        if not self.is_local:
            raise NotChecked(f"{name} ({size}) is not on this machine yet; train.py downloads it from the hub")
        return f"{name}: {size}"

    @cached_property
    def plan(self) -> Plan:
        """What ``ullme plan`` predicts for this machine's device and its free memory."""
        import torch

        from ullme.planning.devices import Device, free_memory, peak_tflops
        from ullme.planning.plan import make_plan

        job, count = self.job, 1
        gpu = torch.cuda.is_available() and self.config.trainer.accelerator != "cpu"
        place = torch.device("cuda" if gpu else "cpu")
        name = torch.cuda.get_device_name() if gpu else "CPU"
        if gpu:
            devices = str(self.config.trainer.devices)
            count = int(devices) if devices.isdigit() else torch.cuda.device_count()
        strategy = self.config.trainer.strategy
        named = strategy if isinstance(strategy, str) else strategy.class_path
        fsdp = any(word in named.lower() for word in ("fsdp", "modelparallel"))
        device = Device(name, peak_tflops(name) or 1, free_memory(place) / GIB, kind=place.type)
        return make_plan(job, device, count, fsdp)

    def memory(self) -> str:
        """Raises: CheckFailed: the plan does not fit into free memory."""
        plan = self.plan
        need, free = plan.memory.total / GIB, plan.device.memory_gib
        planned = f"{need:.1f} GiB planned, {free:.1f} GiB free on {plan.device.name}"
        if not plan.fits:
            largest = max(vars(plan.memory), key=lambda part: getattr(plan.memory, part))
            raise CheckFailed(
                f"{planned}; the largest part is {largest}", _MEMORY_REMEDIES.get(largest, _MEMORY_REMEDIES["weights"])
            )
        return planned

    def disk(self) -> str:
        """Raises: CheckFailed: checkpoints, or an LLM yet to be downloaded, do not fit."""
        from huggingface_hub import constants

        plan = self.plan
        kept = max(2, 2 + self.config.checkpoint.save_top_k)  # last, one that is being written, and the best
        checkpoints = kept * plan.trained * 3 * 4
        results = [free_disk(self.root, checkpoints, f"{kept} checkpoints")]
        if not self.is_local:
            weights = plan.weights * 2
            results.append(free_disk(Path(constants.HF_HUB_CACHE), weights, "the LLM's weights"))
        return "; ".join(results)

    def run_folder(self) -> str:
        """Raises: ValueError, CheckFailed: it cannot be written, or holds a finished run."""
        from ullme.commands.doctor.machine import existing
        from ullme.training.resume import FINISHED
        from ullme.utils.atomic_files import check_writable, newest_first

        if not existing(self.root).is_dir():
            raise CheckFailed(f"{existing(self.root)} is a file", "name another folder with --trainer.default_root_dir")
        check_writable(existing(self.root))
        checkpoints = Path(self.config.checkpoint.dirpath or self.root / "checkpoints")
        if (checkpoints / FINISHED).is_file():
            raise CheckFailed(
                f"{self.root} holds a finished run",
                "name another folder with --trainer.default_root_dir, or go on there with --ckpt_path=last",
            )
        found = newest_first(checkpoints)
        return f"{self.root} can be written" + (f"; train.py fit resumes from {found[0]}" if found else "")

    def train_data(self) -> str:
        """Raises: ValueError: no such file, a bad row, or options that a run refuses; CheckFailed: no rows; NotChecked:
        a dataset of the hub."""
        from ullme.commands.plan import data_module
        from ullme.data.mixture import TrainSet

        data = self.config.data
        whole = (
            TrainSet(data.train, data.train_split, data.train_name, data.schema, columns=data.columns)
            if data.train
            else None
        )
        chosen = [whole] if whole else data.datasets or []
        if not chosen:
            raise CheckFailed("there are no training rows", "give data.train or data.datasets")
        data_module(data)  # refuses what a run refuses
        return "; ".join(_check_first_rows(one, data.on_bad_row) for one in chosen)

    def val_data(self) -> str:
        """Raises: ValueError: a file is missing, or its first rows cannot be read; NotChecked: no validation."""
        from ullme.data.beir import preview

        data = self.config.data
        if data.val is None:
            raise NotChecked("no data.val: the run is not validated, and last.ckpt is the only checkpoint")
        preview(data.val, data.val_split, _ROWS)
        return f"{data.val}: corpus, queries and qrels/{data.val_split}.tsv are there, and their first rows are valid"


_MEMORY_REMEDIES = {
    "weights": "model.backbone.dtype=bfloat16, more devices with configs/strategy/fsdp2.yaml, or a smaller LLM",
    "training": "train an adapter (model.backbone.lora_name), or share it over devices with FSDP",
    "reference": "loss.reference=adapters_off, which needs no second LLM",
    "activations": "loss.chunk_tokens=auto, a smaller loss.chunk_size, or model.backbone.gradient_checkpointing=auto",
    "head": "a smaller loss.chunk_size or loss.chunk_tokens",
    "batch": "a smaller data.batch_size or fewer data.num_hard_negatives",
}


def _check_first_rows(one: Any, on_bad_row: str) -> str:
    """Parse the first rows of a training set. Raises: as :meth:`Settings.train_data`."""
    from ullme.data.columns import split_option
    from ullme.data.files import check_kind, expand_files, is_jsonl
    from ullme.data.jsonl import iter_lines, parse_line
    from ullme.data.records import parse_record

    names = [one.train] if isinstance(one.train, str) else list(one.train)
    for name in names:
        check_kind(name, one.split)
    if all(map(is_jsonl, names)):
        files = [path for name in names for path in expand_files(name, one.split)]
        read = 0
        for path in files:
            for number, _, raw in islice(iter_lines(path), _ROWS):

                def parse(raw: bytes = raw) -> Any:
                    return parse_record(parse_line(raw), one.schema, split_option(one.columns)[0])

                read += _parses(parse, f"{path}:{number}", on_bad_row)
        if not read:
            raise ValueError(f"data.train={one.train!r} begins with no usable row; check the file")
        return f"{one.train}: {len(files)} files, the first {read} rows are valid"
    missing = [name for name in names if Path(name).suffix and not Path(name).exists()]
    if missing:
        raise ValueError(f"data.train={missing[0]!r}: no such file; check the path (read relative to {Path.cwd()})")
    if len(names) == 1 and not Path(names[0]).exists():
        raise NotChecked(
            f"{names[0]} is a dataset of the hub: train.py reads it, and checks every row, before training"
        )
    raise NotChecked(f"{one.train}: there; train.py checks every row before training")


def _parses(parse: Callable[[], Any], where: str, on_bad_row: str) -> bool:
    from ullme.data.records import BadRow

    try:
        parse()
    except BadRow as reason:
        if on_bad_row == "skip":
            return False
        raise ValueError(f"{where}: {reason}; fix the row or set data.on_bad_row=skip") from None
    return True


def read(arguments: argparse.Namespace, overrides: list[str]) -> Settings:
    """The configuration of a command line. Raises: ValueError, ArgumentError: a mistake in it."""
    from ullme.commands.train import read_configs

    return Settings(read_configs([*(f"--config={path}" for path in arguments.config), *overrides]))
