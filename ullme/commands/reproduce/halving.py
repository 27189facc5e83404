"""Training the cells of a sweep with early stopping, see :class:`~ullme.commands.reproduce.sweep.Halving`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ullme.callbacks.checkpoint import STOPPED_FILE
from ullme.commands.reproduce.cells import Cell
from ullme.commands.reproduce.run import CellError, done, locked
from ullme.commands.reproduce.sweep import Halving, Point, survivors


def run_halving(
    cells: Sequence[Cell],
    points: Mapping[str, Point],
    stop: Halving,
    run: Callable[[list[Cell]], dict[str, str]],
) -> dict[str, str]:
    """Run the cells, stopping those of hopeless points. What an earlier call did is not done again.

    Args:
        cells: all of the sweep, also those that are done.
        points: row id -> point. Rows that are no points are run to the end.
        stop: when and how many.
        run: runs cells; returns cell name -> why it failed.

    Returns:
        Cell name -> why it failed.

    Raises:
        ValueError: another process works on this sweep.
    """
    going_on, failed = list(cells), dict[str, str]()
    try:
        with locked(Path(cells[0].table.output) / "sweep"):
            for step in stop.steps:
                waiting = [cell for cell in going_on if cell.row_id in points and not done(cell)]
                failed |= run([replace(cell, stop_after=step) for cell in waiting if value_of(cell, step) is None])
                before, going_on = going_on, remaining(going_on, points, step, stop)
                count, left = (len({c.row_id for c in some if c.row_id in points}) for some in (before, going_on))
                print(f"sweep: {left} of {count} points go on after step {step}", flush=True)
            return failed | run([cell for cell in going_on if not done(cell)])
    except CellError as error:
        raise ValueError(str(error)) from None


def remaining(cells: Sequence[Cell], points: Mapping[str, Point], step: int, stop: Halving) -> list[Cell]:
    """The cells whose points go on after a stop, and those that need no more training."""
    groups: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells:
        if cell.row_id in points:
            rivals = groups.setdefault((cell.model_id, points[cell.row_id].row), {})
            rivals.setdefault(cell.row_id, []).append(cell)
    best = set()
    for (model, _), rivals in groups.items():
        values = {row_id: value_at(seeds, step) for row_id, seeds in rivals.items()}
        mode = next(iter(rivals.values()))[0].parsed[0].checkpoint.mode
        best |= {(model, row_id) for row_id in survivors(values, stop.keep, mode)}
    return [c for c in cells if c.row_id not in points or (c.model_id, c.row_id) in best or done(c)]


def value_at(cells: Sequence[Cell], step: int) -> float | None:
    """The mean of the validation metric over the cells of a point at a stop; None unless all of them have it."""
    values = [value_of(cell, step) for cell in cells]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def value_of(cell: Cell, step: int) -> float | None:
    """The validation metric of a cell at a stop; None where its training has not been there."""
    file = cell.stages[0][1] / STOPPED_FILE.format(step)
    return json.loads(file.read_text())["value"] if file.is_file() else None


def check_whole_points(cells: Sequence[Cell], points: Mapping[str, Point]) -> None:
    """Raises: ValueError: --only leaves out points or seeds that others are compared with."""
    seeds: dict[tuple[str, str], dict[str, set[int]]] = {}
    for cell in cells:
        if cell.row_id in points:
            group = seeds.setdefault((cell.model_id, points[cell.row_id].row), {})
            group.setdefault(cell.row_id, set()).add(cell.seed)
    for (model, row), found in seeds.items():
        rivals = [name for name, point in points.items() if point.row == row]
        if len(found) < len(rivals) or len({frozenset(one) for one in found.values()}) > 1:
            raise ValueError(
                f"--only: sweep.stop compares all points and seeds of {model}/{row}; leave --only out, or sweep.stop"
            )
