"""The plots of a table, drawn without pyplot's global state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ullme.commands.reproduce.statistics import AVERAGE
from ullme.commands.reproduce.tables import Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ullme.commands.reproduce.sweep_report import Result


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def averages(table: Table, title: str) -> Figure:
    """A panel for each model: a bar for each row's average, every seed as a dot, the paper's figure as a diamond."""
    figure = _figure(4.5 * len(table.models), 0.45 * len(table.rows) + 1.4)
    panels = figure.subplots(1, len(table.models), squeeze=False, sharey=True)[0]
    places = range(len(table.rows))
    for panel, (model, label) in zip(panels, table.models.items(), strict=True):
        for place, row in zip(places, table.rows, strict=True):
            entry = table.entries.get((model, row, AVERAGE))
            if entry is None or entry.mean is None:
                text = "  not run" if entry is None else "  not on all tasks"
                panel.text(0.0, place, text, va="center", color="0.5")
            else:
                panel.barh(place, entry.mean, xerr=entry.deviation, color="C0", alpha=0.6, ecolor="0.2", capsize=3)
                panel.plot(list(entry.values.values()), [place] * len(entry.values), ".", color="0.2", markersize=4)
                panel.text(0.0, place, f"  {number(entry.mean)}", va="center")
            if (paper := table.figure(model, row, AVERAGE)) is not None:
                panel.plot(paper, place, "D", color="C1")
        panel.set(title=label, xlabel=f"mean over {len(table.columns[AVERAGE])} tasks", xlim=(0, None))
        panel.set_yticks(list(places), list(table.rows.values()))
    panels[0].set_ylim(len(table.rows) - 0.5, -0.5)
    figure.suptitle(title)
    return figure


def heat_map(table: Table, title: str) -> Figure:
    """A panel for each model: tasks x rows. A number is a score, its colour the distance to the mean of the rows."""
    columns = list(table.columns)
    if not columns:
        figure = _figure(4, 1)
        figure.suptitle(f"{title}: no results")
        return figure
    figure = _figure((0.75 * len(table.rows) + 1.5) * len(table.models) + 2, max(3.5, 0.28 * len(columns) + 2))
    panels = figure.subplots(1, len(table.models), squeeze=False, sharey=True)[0]
    scores = {model: _scores(table, model, columns) for model in table.models}
    distances = {model: _from_mean(values) for model, values in scores.items()}
    limit = max([1.0, *(float(np.nanmax(np.abs(d))) for d in distances.values() if np.isfinite(d).any())])
    for panel, (model, label) in zip(panels, table.models.items(), strict=True):
        image = panel.imshow(distances[model], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for (line, place), score in np.ndenumerate(scores[model]):
            text = "·" if np.isnan(score) else f"{score:.1f}"
            color = "white" if abs(distances[model][line, place]) > 0.6 * limit else "black"
            panel.text(place, line, text, ha="center", va="center", fontsize=7, color=color)
        panel.set(title=label)
        panel.set_xticks(range(len(table.rows)), list(table.rows.values()), rotation=45, ha="right", fontsize=8)
        panel.set_yticks(range(len(columns)), columns, fontsize=8)
    figure.colorbar(image, ax=list(panels), label="points from the rows' mean", shrink=min(1.0, 8 / len(columns)))
    figure.suptitle(title)
    return figure


def sweep_axis(results: Sequence[Result], axis: str, metric: str, title: str) -> Figure:
    """A point of the sweep is a dot, and a line joins those that differ in this axis alone. Above: the average of the
    tasks, of the points that were evaluated; below: the validation metric at the first stop, of all points."""
    stops = [step for result in results for step in result.validation]
    panels: list[tuple[str, Callable[[Result], float | None]]] = [("mean over the tasks", lambda result: result.score)]
    if stops:
        first = min(stops)
        panels.append((f"{metric} after step {first}", lambda result: result.validation.get(first)))
    values = list(dict.fromkeys(str(result.point.values[axis]) for result in results))
    lines: dict[str, list[Result]] = {}
    for result in results:
        others = [f"{name} {value}" for name, value in result.point.values.items() if name != axis]
        lines.setdefault(", ".join([result.model, result.point.label, *others]), []).append(result)
    figure = _figure(7, 3 * len(panels) + 0.5)
    for panel, (label, height) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for name, line in lines.items():
            known = [(values.index(str(r.point.values[axis])), y) for r in line if (y := height(r)) is not None]
            panel.plot([x for x, _ in known], [y for _, y in known], "o-", label=name, markersize=4)
        panel.set(ylabel=label, xlim=(-0.5, len(values) - 0.5))
        panel.set_xticks(range(len(values)), values)
    panel.set_xlabel(axis)
    if len(lines) > 1:
        panel.legend(fontsize=6)
    figure.suptitle(title)
    return figure


def _scores(table: Table, model: str, columns: list[str]) -> np.ndarray:
    """(columns, rows); NaN where there is no score."""
    entries = [[table.entries.get((model, row, column)) for row in table.rows] for column in columns]
    return np.array(
        [[np.nan if entry is None or entry.mean is None else entry.mean for entry in line] for line in entries],
        dtype=float,
    )


def _from_mean(scores: np.ndarray) -> np.ndarray:
    known = np.isfinite(scores)
    mean = np.where(known, scores, 0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    return scores - mean


def save(figure: Figure, file: Path) -> None:
    """Save a figure as PNG."""
    figure.savefig(file, dpi=150)
