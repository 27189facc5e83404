"""What the paper's tables are about (arXiv 2408.03402): the tasks, and the figures that could be read, with source."""

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
        value: in points, as printed.
        source: where it was read.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Paper:
    """A table of the paper.

    Args:
        types: mteb's name of a task -> its type; in the order of the types, then of the names.
        figures: (model, row, column) -> figure; the column is "Average", a type or mteb's name of a task, whatever way
            the file writes that.
        why_absent: why a figure may be missing, one sentence for the reader of the table.
    """

    types: dict[str, str]
    figures: dict[tuple[str, str, str], Figure]
    why_absent: str


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
    figures = {
        (entry["model"], entry["row"], _column(entry["column"])): Figure(float(entry["value"]), entry["source"])
        for entry in content["figures"]
    }
    types = {task: kind for kind, tasks in content["tasks"].items() for task in tasks}
    return Paper(types, figures, content["why_absent"])


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
