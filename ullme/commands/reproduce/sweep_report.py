"""The report of a sweep: its points as a table, and a plot of each axis."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullme.commands.reproduce import plots
from ullme.commands.reproduce.cells import Cell
from ullme.commands.reproduce.halving import value_at
from ullme.commands.reproduce.scores import CellScores
from ullme.commands.reproduce.spec import Table, seeds_of
from ullme.commands.reproduce.statistics import AVERAGE, Entry, Grid
from ullme.commands.reproduce.sweep import Point
from ullme.commands.reproduce.tables import UNKNOWN, markdown, number, ours


@dataclass(frozen=True)
class Result:
    """What is known of a point.

    Args:
        model: id of the LLM.
        point: row and values.
        validation: stop -> mean of the validation metric over the seeds; stops that it has not reached are left out.
        entry: its scores over all tasks, in points (0 to 100); None where it was not evaluated.
    """

    model: str
    point: Point
    validation: dict[int, float]
    entry: Entry | None

    @property
    def score(self) -> float | None:
        """The mean over all tasks and seeds."""
        return self.entry.mean if self.entry else None

    @property
    def state(self) -> str:
        """done, at which step it stopped, or not run."""
        if self.score is not None:
            return "done"
        return f"stopped after step {max(self.validation)}" if self.validation else "not run"


def write_sweep(table: Table, points: Mapping[str, Point], cells: Sequence[CellScores]) -> None:
    """Write sweep.md, sweep.csv and a sweep_AXIS.png for each axis into the table's folder.

    Args:
        table: with a row for each point.
        points: row id -> point.
        cells: the finished ones.
    """
    folder, axes = Path(table.output), list(table.sweep.grid)
    found = results(table, points, cells)
    metric = _metric(table, points)
    names = {axis: f"sweep_{''.join(c if c.isalnum() else '_' for c in axis)}.png" for axis in axes}
    for axis, name in names.items():
        plots.save(plots.sweep_axis(found, axis, metric, table.title), folder / name)
    stops = sorted({step for result in found for step in result.validation})
    text = [f"# {table.title}: the sweep", _rule(table, metric)]
    for name, model in table.models.items():
        of_model = [result for result in found if result.model == name]
        text += [f"## {model.label}", markdown(_lines(of_model, axes, stops, metric)), _best(of_model)]
    text += [f"![{axis}]({name})" for axis, name in names.items()]
    (folder / "sweep.md").write_text("\n\n".join(part.strip() for part in text) + "\n", encoding="utf-8")
    (folder / "sweep.csv").write_text(_csv(found, axes, stops), encoding="utf-8")


def results(table: Table, points: Mapping[str, Point], cells: Sequence[CellScores]) -> list[Result]:
    """Every point of every LLM, in the order of the grid."""
    grid = Grid.of(cells)
    stops = table.sweep.stop.steps
    found = []
    for model in table.models:
        for row_id, point in points.items():
            seeds = [Cell(table, model, row_id, seed) for seed in seeds_of(table, table.rows[row_id])]
            values = {step: value for step in stops if (value := value_at(seeds, step)) is not None}
            found.append(Result(model, point, values, grid.entry(model, row_id, grid.types)))
    return found


def _metric(table: Table, points: Mapping[str, Point]) -> str:
    """The name of the validation metric."""
    row_id = next(iter(points))
    return str(Cell(table, next(iter(table.models)), row_id, 0).parsed[0].checkpoint.monitor)


def _rule(table: Table, metric: str) -> str:
    stop = table.sweep.stop
    if not stop.steps:
        return "Every point is trained to its end and evaluated."
    steps = ", ".join(map(str, stop.steps))
    return (
        f"Successive halving (arXiv 1502.07943): after step {steps} the best {stop.keep:.0%} of the points by {metric} "
        "(mean over seeds) go on; the others are not evaluated."
    )


def _lines(found: Sequence[Result], axes: Sequence[str], stops: Sequence[int], metric: str) -> list[list[str]]:
    head = ["row", *axes, *(f"{metric} after {step}" for step in stops), f"{AVERAGE} of the tasks", "state"]
    lines = [
        [
            *(result.point.label, *(str(result.point.values[axis]) for axis in axes)),
            *(f"{result.validation[step]:.4f}" if step in result.validation else UNKNOWN for step in stops),
            *(ours(result.entry) if result.entry else UNKNOWN, result.state),
        ]
        for result in found
    ]
    return [head, *lines]


def _best(found: Sequence[Result]) -> str:
    """The point with the highest average."""
    scored = [(result.score, result) for result in found if result.score is not None]
    if not scored:
        return "No point is evaluated on all tasks."
    score, best = max(scored, key=lambda pair: pair[0])
    return (
        f"Highest average: {best.point.row_label}, {number(score)}. If these tasks are what you report, choose by the "
        "validation metric instead."
    )


def _csv(found: Sequence[Result], axes: Sequence[str], stops: Sequence[int]) -> str:
    """A line for each point; numbers are not rounded, unknown values are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "row", *axes, *(f"validation_{step}" for step in stops), "score", "seeds", "state"])
    for result in found:
        seeds = len(result.entry.values) if result.entry else 0
        values: list[Any] = [result.point.values[axis] for axis in axes]
        validation = [result.validation.get(step) for step in stops]
        writer.writerow([result.model, result.point.row, *values, *validation, result.score, seeds, result.state])
    return out.getvalue()
