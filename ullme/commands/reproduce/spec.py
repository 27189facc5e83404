"""The configuration of a table: LLMs, rows, seeds, how a cell is trained and what it is evaluated on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import Path_fr

from ullme.commands.reproduce.sweep import Sweep

# The value of an option. Not Any, which would parse a template such as "{text}\n" as YAML.
Value = str | bool | int | float | list[Any] | dict[str, Any] | None
_ID = re.compile(r"[\w.-]+")


@dataclass
class Stage:
    """One training.

    Args:
        config: a configuration of train.py, stacked on those of the table and of the LLM.
        options: of train.py, in this stage only: dotted name -> value.
    """

    config: Path_fr
    options: dict[str, Value] = field(default_factory=dict)


@dataclass
class Model:
    """An LLM of the table.

    Args:
        label: printed in the table.
        configs: configurations of train.py that name it.
        train_options: further options of train.py, dotted name -> value.
        evaluate_options: options of evaluate.py for this LLM.
    """

    label: str
    configs: list[Path_fr] = field(default_factory=list)
    train_options: dict[str, Value] = field(default_factory=dict)
    evaluate_options: dict[str, Value] = field(default_factory=dict)


@dataclass
class Row:
    """A row of the table: how an LLM becomes an embedder.

    Args:
        label: printed in the table.
        stages: trainings, each of which starts from the result of the one before. Empty for an existing embedder.
        train: false: nothing is trained; the first stage's configuration says how the LLM is run (attention, pooling,
            prompts), and the row is evaluated once.
        model: without stages: an LLM or a sentence-transformers model to evaluate instead of the table's LLM, a hub
            name or a folder.
        checkpoint: without stages: a run folder, a checkpoint or an adapter (PEFT) folder to evaluate.
        seeds: default: the table's. An existing embedder has one, 0.
        train_options: further options of train.py, in every stage.
        evaluate_options: options of evaluate.py for this row.
    """

    label: str
    stages: list[Stage] = field(default_factory=list)
    train: bool = True
    model: str | None = None
    checkpoint: str | None = None
    seeds: list[int] | None = None
    train_options: dict[str, Value] = field(default_factory=dict)
    evaluate_options: dict[str, Value] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether a seed changes anything."""
        return self.train and bool(self.stages)


@dataclass
class Table:
    """A table: every LLM with every row and every seed is a cell. Values may hold {llm} and {data}, see --llm, --data.

    Args:
        title: of the table.
        models: id -> LLM, in the table's order. The id is part of the cells' folders.
        rows: id -> row, in the table's order. The id is part of the cells' folders.
        output: folder of all files of the table.
        seeds: of the trainings.
        order: ids of rows in the order that the paper claims, worst first.
        paper: name of the paper's table to compare with; null for none.
        configs: configurations of train.py for every cell, before those of the LLM and of the row.
        train_options: further options of train.py for every cell, dotted name -> value.
        evaluate_options: options of evaluate.py for every cell, such as tasks, corpus or max_length.
        wandb_project: of the cells' W&B runs, where the configuration logs to W&B.
        world: miniature: generate data and a tiny LLM first; {data} and {llm} are their folders.
        sweep: train each row with every point of a grid of options.
    """

    title: str
    models: dict[str, Model]
    rows: dict[str, Row]
    output: str
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    order: list[str] = field(default_factory=list)
    paper: str | None = None
    configs: list[Path_fr] = field(default_factory=list)
    train_options: dict[str, Value] = field(default_factory=dict)
    evaluate_options: dict[str, Value] = field(default_factory=dict)
    wandb_project: str = "ullme"
    world: Literal["miniature"] | None = None
    sweep: Sweep = field(default_factory=Sweep)


def check(table: Table) -> None:
    """Check a table before anything is run.

    Raises:
        ValueError: an id that is not a folder name, an unknown row in ``order``, a row that both trains and
            names an embedder, or seeds that repeat or are negative.
    """
    if not table.models or not table.rows:
        raise ValueError("models and rows: the table needs at least one of each")
    for kind, names in (("models", table.models), ("rows", table.rows)):
        for name in names:
            if not _ID.fullmatch(name):
                raise ValueError(f"{kind}: {name!r} names a folder; use letters, digits, dots and dashes")
    if unknown := [name for name in table.order if name not in table.rows]:
        raise ValueError(f"order={table.order}: there is no row {unknown[0]!r}; rows are {list(table.rows)}")
    for name, row in table.rows.items():
        given = row.model or row.checkpoint
        if row.stages and given:
            raise ValueError(f"rows.{name}: stages train an embedder and {given!r} is one; keep one of them")
        if not row.train and len(row.stages) != 1:
            raise ValueError(f"rows.{name}.train=false needs one stage, whose config says how the LLM is run")
        seeds = seeds_of(table, row)
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"rows.{name}: seeds {seeds} must be different numbers from 0 on, at least one")


def seeds_of(table: Table, row: Row) -> list[int]:
    """The seeds of a row's cells; an untrained embedder has one, since nothing about it is random."""
    if not row.trained:
        return [0]
    return table.seeds if row.seeds is None else row.seeds


def fill(value: Any, llm: str | None, data: str | None) -> Any:
    """{llm} and {data} filled in, wherever they stand in a value.

    Raises:
        ValueError: one is needed and not given.
    """
    if isinstance(value, str):
        for name, given in (("llm", llm), ("data", data)):
            if f"{{{name}}}" in value:
                if given is None:
                    raise ValueError(f"--{name} is missing; this table's configuration says {value!r}")
                value = value.replace(f"{{{name}}}", given)
        return value
    if isinstance(value, dict):
        return {key: fill(part, llm, data) for key, part in value.items()}
    return [fill(part, llm, data) for part in value] if isinstance(value, list) else value


def filled(table: Table, llm: str | None, data: str | None) -> Table:
    """The table with {llm} and {data} filled in.

    Raises:
        ValueError: the table asks for one that is not given.
    """

    def options(one: Any, *also: str) -> Any:
        names = [n for n in ("train_options", "evaluate_options", "options", *also) if hasattr(one, n)]
        return replace(one, **{name: fill(getattr(one, name), llm, data) for name in names})

    return replace(
        options(table),
        models={name: replace(options(m), label=_label(m.label, llm, data)) for name, m in table.models.items()},
        rows={
            name: replace(options(row, "model", "checkpoint"), stages=[options(stage) for stage in row.stages])
            for name, row in table.rows.items()
        },
    )


def _label(label: str, llm: str | None, data: str | None) -> str:
    """In a label {llm} is the last part of the LLM's name or path."""
    return fill(label, llm and Path(llm).name, data)


def chosen(table: Table, only: list[str]) -> Iterator[tuple[str, str, int]]:
    """The (model, row, seed) of every cell that ``only`` names: "model", "model/row" or "model/row/seed", and "*" for
    any of them. Nothing named: all.

    The order is by seed, then row, then model, so that a table that is stopped early has complete seeds.

    Raises:
        ValueError: a filter that matches no cell.
    """
    cells = [
        (model, name, seed)
        for model in table.models
        for name, row in table.rows.items()
        for seed in seeds_of(table, row)
    ]
    fits = {pattern: [cell for cell in cells if _fits(pattern, cell)] for pattern in only}
    if nothing := [pattern for pattern, found in fits.items() if not found]:
        raise ValueError(
            f"--only {nothing[0]} fits no cell; models are {list(table.models)}, rows {list(table.rows)}, "
            f"seeds {table.seeds}"
        )
    kept = [cell for cell in cells if not only or any(cell in found for found in fits.values())]
    places = [*dict.fromkeys(seed for _, _, seed in kept)]
    return iter(sorted(kept, key=lambda cell: places.index(cell[2])))


def _fits(pattern: str, cell: tuple[str, str, int]) -> bool:
    parts = pattern.strip("/").split("/")
    wanted = ("*", "*", "*") if len(parts) > 3 else (*parts, *["*"] * (3 - len(parts)))
    model, row, seed = cell
    return len(parts) <= 3 and all(
        want in ("*", have) for want, have in zip(wanted, (model, row, str(seed)), strict=True)
    )


def path(file: Path_fr) -> Path:
    """The path for a command line: relative to the current folder where it is below it, else absolute."""
    full = Path(file.absolute).resolve()
    return full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full
