"""The paper's tables (arXiv 2408.03402): the tasks they cover and the figures they print."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ullme.commands.reproduce.scores import CellScores, TaskScore

FILE = Path(__file__).with_name("paper.json")


@dataclass(frozen=True)
class Figure:
    """One figure of the paper.

    Args:
        value: in points, as printed; the figure of a type of task is a mean of printed ones.
        source: the paper and its table.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Cost:
    """What one row of the table cost, as the paper prints it.

    Args:
        row: id of the row.
        hardware: that it was trained on.
        training_days: model -> days.
        tokens_per_second: model -> tokens embedded a second after training; the paper does not say on how many devices.
        source: the paper and its section.
    """

    row: str
    hardware: str
    training_days: dict[str, float]
    tokens_per_second: dict[str, float]
    source: str


@dataclass(frozen=True)
class Paper:
    """A table of the paper.

    Args:
        types: mteb's name of a task -> its type; in the order of the types, then of the names.
        figures: (model, row, column) -> figure; the column is "Average", a type or mteb's name of a task, whatever way
            the file writes that.
        cost: days of training and tokens per second.
        remarks: what a reader of the figures has to know, a sentence or two each.
    """

    types: dict[str, str]
    figures: dict[tuple[str, str, str], Figure]
    cost: Cost
    remarks: list[str]


@cache
def _content() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def read_paper(name: str) -> Paper:
    """The table of that name.

    Raises:
        ValueError: there is none, or a figure is of an unknown task.
    """
    content = _content()
    if name not in content["tables"]:
        raise ValueError(
            f"paper={name!r} is no table of the paper; choose from {', '.join(content['tables'])}, or none"
        )
    types = {task: kind for kind, tasks in content["tasks"].items() for task in tasks}
    figures = {
        (entry["model"], entry["row"], _column(column)): Figure(float(value), entry["source"])
        for entry in content["figures"]
        for column, value in entry["values"].items()
    }
    figures = {**_type_means(figures, content["tasks"]), **figures}
    return Paper(types, figures, Cost(**content["cost"]), content["remarks"])


def _type_means(
    figures: dict[tuple[str, str, str], Figure], tasks_of: dict[str, list[str]]
) -> dict[tuple[str, str, str], Figure]:
    """The mean over each type of task, of the models and rows whose tasks of that type are all printed."""
    means: dict[tuple[str, str, str], Figure] = {}
    for model, row in dict.fromkeys((model, row) for model, row, _ in figures):
        for kind, tasks in tasks_of.items():
            found = [figures[key] for task in tasks if (key := (model, row, task)) in figures]
            if len(found) == len(tasks):
                mean = round(statistics.fmean(figure.value for figure in found), 2)
                means[model, row, kind] = Figure(mean, f"{found[0].source}, mean over the type")
    return means


def _column(written: str) -> str:
    return written if written in ("Average", *_content()["tasks"]) else task_name(written)


def task_name(written: str) -> str:
    """mteb's name of a task as papers write it: "CQADupstack", "STS17 (en-en)", "AmazonCounterfactual" ...

    Raises:
        ValueError: none of the 56 tasks of MTEB(eng, v1).
    """
    content = _content()
    known = {_plain(task): task for tasks in content["tasks"].values() for task in tasks}
    short = {name.removesuffix("classification"): task for name, task in known.items()}
    aliases = {_plain(alias): task for alias, task in content["aliases"].items()}
    plain = _plain(re.sub(r"\s*\([a-z]{2}(-[a-z]{2})?\)\s*$", "", written))
    for names in (known, aliases, short):
        if plain in names:
            return names[plain]
    raise ValueError(f"{written!r} is none of the 56 tasks of {content['benchmark']}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def aggregate(cells: Iterable[CellScores]) -> list[CellScores]:
    """The cells with the mean of the twelve CQADupstack forums as one task, as mteb and the paper count them.

    A cell without all twelve gets no such task. The forums themselves stay in the cell.
    """
    return [replace(cell, tasks=[*cell.tasks, *_aggregated(cell)]) for cell in cells]


def _aggregated(cell: CellScores) -> list[TaskScore]:
    scores = {task.name: task for task in cell.tasks}
    return [
        TaskScore(
            name,
            scores[parts[0]].type,
            scores[parts[0]].metric,
            statistics.fmean(scores[part].score for part in parts),
        )
        for name, parts in _content()["aggregated"].items()
        if name not in scores and all(part in scores for part in parts)
    ]


def parts_of_aggregates() -> frozenset[str]:
    """The tasks that count only as part of another."""
    return frozenset(part for parts in _content()["aggregated"].values() for part in parts)
