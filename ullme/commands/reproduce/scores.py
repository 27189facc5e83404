"""scores.json: the results of a cell of a table (one LLM, one row, one seed)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ullme.utils import atomic_files

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class TaskScore:
    """The main score of one task.

    Args:
        name: mteb's name of the task.
        type: mteb's type, such as Retrieval or STS.
        metric: mteb's name of the main score.
        score: from 0 to 1 (correlations: -1 to 1).
    """

    name: str
    type: str
    metric: str
    score: float


@dataclass(frozen=True)
class CellScores:
    """The scores of one cell.

    Args:
        model: id of the LLM in the table's configuration.
        row: id of the row.
        seed: of the training.
        tasks: in the order of evaluation.
        queries: retrieval task -> query id -> the task's metric for that query alone, where it is known.
        commands: what was run for this cell, in order, as shell lines.
        notes: hardware, versions, seconds of training and of evaluation, tokens seen; plain values.
        failed: task -> why it has no score. Such a cell is not done: the table shows the tasks that it has, and the
            next start evaluates the others.
    """

    model: str
    row: str
    seed: int
    tasks: list[TaskScore]
    queries: dict[str, dict[str, float]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def cell_folder(root: Path, model: str, row: str, seed: int) -> Path:
    """The folder of a cell, below the table's folder."""
    return root / model / row / f"seed{seed}"


def write_scores(folder: Path, scores: CellScores) -> None:
    """Write a cell's scores atomically: a cell with this file and without failed tasks is done."""
    text = json.dumps(asdict(scores), indent=1)
    atomic_files.write_text(folder / SCORES_FILE, text, "--output")


def read_scores(root: Path) -> list[CellScores]:
    """Every finished cell below a table's folder, ordered by path.

    Raises:
        ValueError: a file that does not hold the scores of a cell.
    """
    found = []
    for path in sorted(root.glob(f"*/*/seed*/{SCORES_FILE}")):
        try:
            values = json.loads(path.read_text())
            found.append(CellScores(**{**values, "tasks": [TaskScore(**task) for task in values["tasks"]]}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} does not hold the scores of a cell ({error}); delete it to run the cell again"
            ) from error
    return found
