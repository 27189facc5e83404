"""The table of results, as text for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HEADER = ("Task", "Type", "Main score", "Score")


@dataclass(frozen=True)
class Row:
    """One task's result.

    Args:
        task: the task's name.
        type: mteb's task type.
        main_score: the name of the score that counts.
        score: its value times 100, or None where the task could not be evaluated.
        error: why it could not be.
    """

    task: str
    type: str
    main_score: str
    score: float | None
    error: str | None = None


def mean_score(rows: Sequence[Row]) -> float | None:
    """Mean over the tasks that have a score; None where none has."""
    scores = [row.score for row in rows if row.score is not None]
    return sum(scores) / len(scores) if scores else None


def write_rows(rows: Sequence[Row], file: str | Path) -> None:
    """Write the rows as JSON, atomically; :func:`read_rows` reads them.

    Raises:
        ValueError: the file cannot be written.
    """
    from ullme.utils import atomic_files  # which imports torch

    text = json.dumps([asdict(row) for row in rows], indent=1)
    atomic_files.write_text(file, text, "--scores")


def read_rows(file: str | Path) -> list[Row]:
    """Read the rows that :func:`write_rows` wrote."""
    return [Row(**row) for row in json.loads(Path(file).read_text(encoding="utf-8"))]


def text_table(rows: Sequence[Row]) -> str:
    """Columns aligned with spaces, the mean in the last line."""
    lines = _cells(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    printed = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=True))][:-1]) for line in lines]
    printed = [f"{left}  {line[-1].rjust(widths[-1])}" for left, line in zip(printed, lines, strict=True)]
    return "\n".join([printed[0], rule, *printed[1:-1], rule, printed[-1]])


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown, the mean in the last row."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in _cells(rows)]
    return "\n".join([lines[0], "|---|---|---|---:|", *lines[1:]])


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    scored = sum(row.score is not None for row in rows)
    label = f"Mean of {scored}" if scored == len(rows) else f"Mean of {scored} of {len(rows)}"
    body = [(row.task, row.type, row.main_score, _number(row.score)) for row in rows]
    return [HEADER, *body, (label, "", "", _number(mean_score(rows)))]


def _number(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"
