"""A cell of a table, and its commands: the arguments of train.py and evaluate.py, which also work by hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ullme.commands.reproduce.scores import cell_folder
from ullme.commands.reproduce.spec import Model, Row, Stage, Table, path
from ullme.planning.devices import number_of
from ullme.utils.precision import device_type

TRAIN = ("-m", "ullme", "train", "fit")
EVALUATE = ("-m", "ullme", "evaluate")
_WANDB = "WandbLogger"


@dataclass(frozen=True)
class Overrides:
    """Options of the command line that replace the table's own: dotted name -> value."""

    train: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One LLM, one row, one seed.

    Args:
        table: with its placeholders filled in.
        model_id: of the LLM.
        row_id: of the row.
        seed: of the training.
        overrides: from the command line.
        stop_after: the step after which the training stops, for a sweep; None trains to the end and evaluates.
    """

    table: Table
    model_id: str
    row_id: str
    seed: int
    overrides: Overrides = field(default_factory=Overrides)
    stop_after: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model_id}/{self.row_id}/seed{self.seed}"

    @property
    def model(self) -> Model:
        return self.table.models[self.model_id]

    @property
    def row(self) -> Row:
        return self.table.rows[self.row_id]

    @property
    def folder(self) -> Path:
        return cell_folder(Path(self.table.output), self.model_id, self.row_id, self.seed)

    @property
    def stages(self) -> list[tuple[Stage, Path]]:
        """The trainings and the folders of their runs."""
        return [(stage, self.run_folder(stage)) for stage in self.row.stages] if self.row.trained else []

    def run_folder(self, stage: Stage) -> Path:
        place = self.row.stages.index(stage)
        return self.folder / ("train" if len(self.row.stages) == 1 else f"train{place + 1}")

    def configuration(self, stage: Stage) -> list[str]:
        """The arguments of train.py that say what is trained, without seeds and folders."""
        configs = [*self.table.configs, *self.model.configs, stage.config]
        options = {
            **self.table.train_options,
            **self.model.train_options,
            **self.row.train_options,
            **stage.options,
            **self.overrides.train,
        }
        return [*(f"--config={path(config)}" for config in configs), *_options(options)]

    @cached_property
    def parsed(self) -> list[Any]:
        """The configuration of each stage as train.py parses it.

        Raises:
            ValueError: train.py would reject it.
        """
        return [parsed(tuple(self.configuration(stage))) for stage in self.row.stages]

    @property
    def devices(self) -> int | str | None:
        """The number of GPUs that a training of this cell uses; "auto" for all of them; None on the CPU."""
        if not self.parsed:
            return 1 if device_type("auto") == "cuda" else None
        wanted = [_gpus_of(config.trainer) for config in self.parsed]
        counts = [count for count in wanted if isinstance(count, int)]
        return "auto" if "auto" in wanted else max(counts, default=None)

    def train_command(self, stage: Stage) -> list[str]:
        """The arguments of Python that train a stage or resume its training."""
        folder, place = self.run_folder(stage), self.row.stages.index(stage)
        before = [f"--model.backbone.init_from={self.run_folder(self.row.stages[place - 1])}"] if place else []
        return [
            *TRAIN,
            *self.configuration(stage),
            *(f"--seed_everything={self.seed}", f"--data.seed={self.seed}"),
            *before,
            *_renumbered_devices(self.parsed[place].trainer),
            f"--trainer.default_root_dir={folder}",
            *self._logger(self.parsed[place].trainer.logger, folder, stage),
            *([] if self.stop_after is None else [f"--checkpoint.stop_after_step={self.stop_after}"]),
        ]

    def evaluate_command(self) -> list[str]:
        """The arguments of Python that evaluate the cell's embedder."""
        options = {
            **self.table.evaluate_options,
            **self.model.evaluate_options,
            **self.row.evaluate_options,
            **self.overrides.evaluate,
        }
        if self.logs_to_wandb:
            options.setdefault("wandb", self.table.wandb_project)
        return [
            *EVALUATE,
            *self._embedder(),
            *_options(options, lists=True),
            f"--output={self.folder / 'mteb'}",
            f"--scores={self.folder / 'tasks.json'}",
            f"--per_query={self.folder / 'per_query'}",
        ]

    def evaluate_environment(self) -> dict[str, str]:
        """Environment variables that name the evaluation's W&B run."""
        if not self.logs_to_wandb:
            return {}
        name, group, tags = self._wandb(self.stages[-1][0] if self.stages else None)
        return {"WANDB_NAME": name, "WANDB_RUN_GROUP": group, "WANDB_TAGS": ",".join(tags)}

    @property
    def logs_to_wandb(self) -> bool:
        """Whether this row's trainings log to W&B; a row without trainings follows the first row that has some."""
        rows = [self.row_id, *self.table.rows]
        configured = next((row for row in rows if self.table.rows[row].stages), None)
        return configured is not None and _kind(replace(self, row_id=configured).parsed[0].trainer.logger) == _WANDB

    def _embedder(self) -> list[str]:
        """The options of evaluate.py that name the embedder, and for an untrained LLM how it is run."""
        row = self.row
        if row.trained:
            return [f"--checkpoint={self.stages[-1][1]}"]
        if not row.stages:
            named = {"model": row.model, "checkpoint": row.checkpoint}
            if not any(named.values()):
                raise ValueError(f"rows.{self.row_id}: it has neither stages nor an embedder; set model or checkpoint")
            return [f"--{name}={value}" for name, value in named.items() if value]
        backbone, prompts = self.parsed[0].model.backbone, self.parsed[0].model.prompts
        options = {
            "model": backbone.model_name_or_path,
            "attention": backbone.attention,
            "pooling": backbone.pooling,
            "dtype": backbone.dtype,
            "query_prompt": prompts.query,
            "passage_prompt": prompts.passage,
            "instruction": prompts.instruction,
            **({"pooled": prompts.pooled} if prompts.pooled != "all" else {}),
            **({"append_eos": True} if prompts.append_eos else {}),
            **({"quantization": backbone.quantization} if backbone.quantization != "none" else {}),
        }
        if backbone.init_from is not None:
            raise ValueError(
                f"rows.{self.row_id}: train=false, but its configuration has model.backbone.init_from="
                f"{backbone.init_from!r}; to evaluate a checkpoint write checkpoint: and no stages"
            )
        return _options({k: v for k, v in options.items() if k not in self._evaluation_given()})

    def _evaluation_given(self) -> set[str]:
        table, model, row = self.table, self.model, self.row
        return {*table.evaluate_options, *model.evaluate_options, *row.evaluate_options, *self.overrides.evaluate}

    def _logger(self, logger: Any, folder: Path, stage: Stage) -> list[str]:
        """The logger's options: files go to the cell's folder; W&B runs get names, groups and tags by table."""
        kind, prefix = _kind(logger), "--trainer.logger.init_args"
        if kind == "CSVLogger":
            return [f"{prefix}.save_dir={folder}", f"{prefix}.name=", f"{prefix}.version="]
        if kind != _WANDB:
            return []
        name, group, tags = self._wandb(stage)
        return [
            *(f"{prefix}.project={self.table.wandb_project}", f"{prefix}.name={name}"),
            *(f"{prefix}.save_dir={folder}", f"{prefix}.group={group}", f"{prefix}.tags={json.dumps(tags)}"),
        ]

    def _wandb(self, stage: Stage | None) -> tuple[str, str, list[str]]:
        """(name, group, tags) of a W&B run."""
        name = f"{self.row_id}-seed{self.seed}"
        if stage is not None and len(self.row.stages) > 1:
            name = f"{name}-{Path(str(stage.config)).stem}"
        table = Path(self.table.output).name
        tags = [f"table:{table}", f"model:{self.model_id}", f"row:{self.row_id}", f"seed:{self.seed}"]
        return name, f"{table}/{self.model_id}", tags

    def settings(self) -> dict[str, Any]:
        """All settings that change the cell's scores, as dotted name -> value; speed and place are not among them. A
        cell is not continued with other settings."""
        from ullme.training.resume import settings_of

        found = {
            f"{stage.config}: {key}" if len(self.stages) > 1 else key: value
            for (stage, _), config in zip(self.stages, self.parsed if self.stages else [], strict=True)
            for key, value in settings_of(config.as_dict()).items()
        }
        place = str(self.folder)
        given = self.evaluate_command()[len(EVALUATE) :]
        options = [option for option in given if place not in option and not option.startswith("--wandb=")]
        stages = [str(stage.config) for stage, _ in self.stages]
        return json.loads(json.dumps({**found, "stages": stages, "evaluate": options}, default=str))


def _kind(logger: Any) -> str:
    """The class name of a configured logger."""
    return getattr(logger, "class_path", "").rsplit(".", 1)[-1]


_PARSED: dict[tuple[str, ...], Any] = {}


def parsed(configuration: tuple[str, ...]) -> Any:
    """A configuration as train.py parses it, not instantiated; cached.

    Raises:
        ValueError: train.py would reject it.
    """
    from jsonargparse import ArgumentError

    from ullme.commands.train import read_configs
    from ullme.utils.errors import one_line

    if configuration not in _PARSED:
        try:
            _PARSED[configuration] = read_configs(configuration)
        except ArgumentError as error:
            raise ValueError(one_line(error)) from error
    return _PARSED[configuration]


def _gpus_of(trainer: Any) -> int | str | None:
    """The number of GPUs of a configured trainer; "auto" for all of them; None on the CPU."""
    return None if device_type(str(trainer.accelerator)) == "cpu" else number_of(trainer.devices)


def _renumbered_devices(trainer: Any) -> list[str]:
    """A cell sees only its own GPUs, numbered from 0: devices that are listed by number become their count."""
    listed = isinstance(trainer.devices, list) or (isinstance(trainer.devices, str) and "," in trainer.devices)
    count = _gpus_of(trainer)
    return [f"--trainer.devices={count}"] if listed and count else []


def shell_line(command: Sequence[str]) -> str:
    """The arguments of Python as a line for a shell."""
    return f"python {shlex.join(command)}"


def _options(options: dict[str, Any], lists: bool = False) -> list[str]:
    """``--name=value`` for each option; with ``lists`` a list becomes evaluate.py's ``--name value value``."""
    found: list[str] = []
    for name, value in options.items():
        if lists and isinstance(value, list):
            found += [f"--{name}", *map(str, value)] if value else []
        else:
            found.append(f"--{name}={_text(value)}")
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse_options(given: Sequence[str], option: str) -> dict[str, Any]:
    """``["a.b=1", "c=[x]"]`` -> ``{"a.b": 1, "c": ["x"]}``; values are YAML.

    Raises:
        ValueError: no ``=`` in it, or a value that is no YAML.
    """
    import yaml

    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.strip("-"):
            raise ValueError(f"{option} {one}: write NAME=VALUE, such as trainer.max_steps=60")
        try:
            found[name.lstrip("-")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{option} {one}: the value is no YAML ({' '.join(str(error).split())})") from None
    return found
