"""A sweep: every row of a table once for each point of a grid of options of train.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullme.commands.reproduce.cells import Cell
    from ullme.commands.reproduce.spec import Row, Table

Value = str | bool | int | float | list[Any] | dict[str, Any] | None


@dataclass
class Halving:
    """Early stopping by successive halving (arXiv 1502.07943, algorithm 1).

    The trainings of all points stop at a step, those with the best validation metric go on to the next step, and those
    that are left at the end are trained to their end and evaluated. The metric is ``checkpoint.monitor``, the mean over
    seeds, and the points are compared within an LLM and a row. All have the learning rates of a whole training.

    Args:
        steps: of training, ascending; each is followed by a validation (``trainer.val_check_interval``). Empty: no
            early stopping, every point is trained to its end.
        keep: the share of the points that goes on, rounded up.
    """

    steps: list[int] = field(default_factory=list)
    keep: float = 0.5


@dataclass
class Sweep:
    """A grid of options of train.py.

    Args:
        grid: name of an axis -> option of train.py -> its values. Several options of one axis change together, so they
            need as many values each. Empty: no sweep.
        stop: early stopping.
    """

    grid: dict[str, dict[str, list[Value]]] = field(default_factory=dict)
    stop: Halving = field(default_factory=Halving)


@dataclass(frozen=True)
class Point:
    """A row at one point of the grid.

    Args:
        row: id of the row in the configuration.
        label: of that row.
        values: axis -> the value of its first option.
        options: option of train.py -> value.
    """

    row: str
    label: str
    values: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def row_id(self) -> str:
        """The id of the row of this point, and part of the cells' folders."""
        parts = [f"{axis}{value}" for axis, value in self.values.items()]
        return re.sub(r"[^\w.-]+", "_", "-".join([self.row, *parts]))

    @property
    def row_label(self) -> str:
        """The label of the row of this point."""
        return ", ".join([self.label, *(f"{axis} {value}" for axis, value in self.values.items())])


def expanded(table: Table) -> tuple[Table, dict[str, Point]]:
    """The table with a row for each point of its sweep, and the points by the ids of these rows.

    Rows without training stay as they are, to compare with. A table without a sweep is returned as it is.

    Raises:
        ValueError: a mistake in the sweep.
    """
    sweep = table.sweep
    if sweep == Sweep():
        return table, {}
    check_sweep(table, sweep)
    rows: dict[str, Row] = {}
    points: dict[str, Point] = {}
    for name, row in table.rows.items():
        if not row.trained:
            rows[name] = row
            continue
        for values, options in _points(sweep.grid):
            point = Point(name, row.label, values, options)
            if point.row_id in rows:
                raise ValueError(
                    f"sweep.grid: two points have the same name {point.row_id!r}; give the axes other names or values"
                )
            points[point.row_id] = point
            stages = [replace(stage, options=_without(stage.options, options)) for stage in row.stages]
            train_options = {**row.train_options, **options}
            rows[point.row_id] = replace(row, label=point.row_label, stages=stages, train_options=train_options)
    return replace(table, rows=rows), points


def _points(grid: dict[str, dict[str, list[Value]]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(axis -> value, option -> value) of every point."""
    lengths = [range(len(next(iter(options.values())))) for options in grid.values()]
    for places in product(*lengths):
        chosen = list(zip(grid.items(), places, strict=True))
        values = {axis: next(iter(options.values()))[place] for (axis, options), place in chosen}
        yield values, {name: given[place] for (_, options), place in chosen for name, given in options.items()}


def _without(options: dict[str, Any], swept: dict[str, Any]) -> dict[str, Any]:
    """A stage's own options come behind the row's, where they would undo the sweep."""
    return {name: value for name, value in options.items() if name not in swept}


def check_sweep(table: Table, sweep: Sweep) -> None:
    """Raises: ValueError: a mistake in the sweep, named by its option."""
    _check_grid(sweep.grid)
    if table.order or table.paper:
        given = "order" if table.order else "paper"
        raise ValueError(f"{given}: a sweep has a row for each point, so rows cannot be named; leave {given} out")
    if not any(row.trained for row in table.rows.values()):
        raise ValueError("sweep: no row of the table is trained; add one with stages")
    if sweep.stop != Halving():
        _check_stop(table, sweep.stop)


def _check_grid(grid: dict[str, dict[str, list[Value]]]) -> None:
    if not grid:
        raise ValueError("sweep.grid is empty; write an axis: {option of train.py: [values]}")
    used: dict[str, str] = {}
    for axis, options in grid.items():
        if not options:
            raise ValueError(f"sweep.grid.{axis} is empty; write the option of train.py and its values")
        if len({len(values) for values in options.values()}) > 1:
            counts = ", ".join(f"{len(values)} of {name}" for name, values in options.items())
            raise ValueError(f"sweep.grid.{axis}: its options change together, but there are {counts} values")
        for name, values in options.items():
            if not values or any(value in values[:n] for n, value in enumerate(values)):
                raise ValueError(f"sweep.grid.{axis}.{name}={values} must have different values, at least one")
            if (other := used.setdefault(name, axis)) != axis:
                raise ValueError(f"sweep.grid.{axis}: {name} is an option of the axis {other} already")
            if name in ("seed_everything", "data.seed"):
                raise ValueError(f"sweep.grid.{axis}: {name} is set by the table; list seeds in seeds")


def _check_stop(table: Table, stop: Halving) -> None:
    ascending = all(a < b for a, b in pairwise(stop.steps))
    if not stop.steps or not ascending or stop.steps[0] < 1:
        raise ValueError(f"sweep.stop.steps={stop.steps} must be ascending numbers of steps, at least one")
    if not 0 < stop.keep < 1:
        raise ValueError(f"sweep.stop.keep={stop.keep} must be a share between 0 and 1, such as 0.5")
    for name, row in table.rows.items():
        if row.trained and len(row.stages) > 1:
            raise ValueError(f"sweep.stop: rows.{name} has {len(row.stages)} stages, and one is needed to stop it")


def check_stops(cells: Sequence[Cell], stop: Halving) -> None:
    """Check the cells of a sweep with early stopping.

    Raises:
        ValueError: no validation, no metric, or a training that ends before the last step.
    """
    for cell in cells:
        if not cell.row.trained:
            continue
        config = cell.parsed[0]
        if config.data.val is None:
            raise ValueError(f"sweep.stop: {cell.name} has no validation; set data.val, and trainer.val_check_interval")
        if config.checkpoint.monitor is None or config.checkpoint.save_top_k == 0:
            raise ValueError(f"sweep.stop: {cell.name} has no metric; set checkpoint.monitor (and save_top_k to 1)")
        last = config.trainer.max_steps
        if 0 <= last <= stop.steps[-1]:
            raise ValueError(
                f"sweep.stop.steps={stop.steps}: the training of {cell.name} has trainer.max_steps={last}, and every "
                "step must be before its end"
            )


def survivors(values: dict[str, float | None], keep: float, mode: str) -> list[str]:
    """The points that go on: the best ⌈keep · n⌉ of n, of equal ones the first.

    Args:
        values: point -> validation metric; None or NaN, of a failed training, never goes on.
        keep: the share.
        mode: max or min, which value is the best.
    """
    known = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}
    sign = -1 if mode == "max" else 1
    ranked = sorted(known, key=lambda name: sign * known[name])  # stable
    best = set(ranked[: math.ceil(keep * len(values) - 1e-9)])
    return [name for name in known if name in best]
