"""Means over seeds, and whether one row of a table is better than another.

Scores are in points (0 to 100). S is the number of seeds, Q the number of queries of a retrieval task.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from ullme.commands.reproduce.scores import CellScores

AVERAGE = "Average"
SEEDS, QUERIES = "seeds", "queries"
HOLDS, REVERSED, UNCLEAR, UNTESTED = "holds", "does not hold", "not significant", "not tested"
LEVEL = 0.05
RESAMPLES = 9999


@dataclass(frozen=True)
class Entry:
    """A cell's mean score over a set of tasks, in points.

    Args:
        values: seed -> mean over all the tasks; seeds that have every task.
        partial: seed -> (mean over its tasks, number of them), for seeds without every task. They are in no average.
        tasks: the number of tasks in the set.
    """

    values: dict[int, float]
    partial: dict[int, tuple[float, int]]
    tasks: int

    @property
    def mean(self) -> float | None:
        """The mean over the seeds in ``values``; None if there are none."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation (S - 1 in the denominator); None with fewer than two seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """A test of the claim that row ``lower`` scores less than row ``higher``.

    Args:
        model: id of the LLM.
        lower: id of the row that the claim puts lower.
        higher: id of the row that the claim puts higher.
        level: the sample of the test, "seeds" or "queries".
        scope: the column of the table (seeds) or the retrieval task (queries).
        difference: mean of higher - lower, in points; positive agrees with the claim. None where it is not known.
        interval: 95 % interval of the difference.
        p: the two-sided p value.
        p_holm: p after Holm's correction for the claims that are tested together, see :func:`holm_corrected`.
        size: the number of seeds or queries.
        agreeing: the number of them in which higher > lower.
        verdict: "holds", "does not hold" (significantly the other way round), "not significant", "not tested".
        reason: why it was not tested.
    """

    model: str
    lower: str
    higher: str
    level: str
    scope: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    size: int = 0
    agreeing: int = 0
    verdict: str = UNTESTED
    reason: str = ""


@dataclass
class Grid:
    """The cells of a table by model, row and seed.

    Args:
        cells: (model, row) -> seed -> cell.
        metrics: task -> the one metric that all cells have of it.
        types: task -> mteb's type.

    Raises:
        ValueError: a cell twice, or a task with different metrics or types in two cells.
    """

    cells: dict[tuple[str, str], dict[int, CellScores]] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Iterable[CellScores]) -> Grid:
        """Build the grid from the cells."""
        grid = cls()
        for cell in cells:
            seeds = grid.cells.setdefault((cell.model, cell.row), {})
            if cell.seed in seeds:
                raise ValueError(f"two results for model {cell.model!r}, row {cell.row!r}, seed {cell.seed}")
            seeds[cell.seed] = cell
            for task in cell.tasks:
                for known, value in ((grid.metrics, task.metric), (grid.types, task.type)):
                    if known.setdefault(task.name, value) != value:
                        raise ValueError(
                            f"task {task.name!r} was scored as {known[task.name]!r} in one cell and as {value!r} in "
                            f"{cell.model}/{cell.row}/seed{cell.seed}; delete that cell to run it again"
                        )
        return grid

    def entry(self, model: str, row: str, tasks: Iterable[str]) -> Entry | None:
        """The cell's mean over ``tasks``; None where the cell has no result for any of them."""
        wanted = set(tasks)
        values, partial = {}, {}
        for seed, cell in sorted(self.cells.get((model, row), {}).items()):
            found = {task.name: 100 * task.score for task in cell.tasks if task.name in wanted}
            if found and found.keys() == wanted:
                values[seed] = statistics.fmean(found.values())
            elif found:
                partial[seed] = (statistics.fmean(found.values()), len(found))
        return Entry(values, partial, len(wanted)) if values or partial else None

    def queries(self, model: str, row: str, task: str) -> dict[str, float]:
        """Query id -> the task's metric for that query in points, averaged over the seeds that have it."""
        seeds = [cell.queries[task] for cell in self.cells.get((model, row), {}).values() if cell.queries.get(task)]
        if not seeds:
            return {}
        common = set.intersection(*(set(seed) for seed in seeds))
        return {query: 100 * statistics.fmean(seed[query] for seed in seeds) for query in sorted(common)}

    def query_tasks(self) -> list[str]:
        """The tasks with scores for single queries in any cell, in order of appearance."""
        found = (task for seeds in self.cells.values() for cell in seeds.values() for task in cell.queries)
        return list(dict.fromkeys(found))


def claims(order: list[str]) -> list[tuple[str, str]]:
    """(lower, higher) for all neighbours in the claimed order, then for its two ends."""
    pairs = list(pairwise(order))
    return [*pairs, (order[0], order[-1])] if len(order) > 2 else pairs


def compare_seeds(grid: Grid, model: str, pair: tuple[str, str], scope: str, tasks: Iterable[str]) -> Comparison:
    """A t test paired by seed: the sample is the difference of each seed, over all ``tasks``.

    With the usual three seeds no resampling can do this: a sign-flip test has p >= 0.25, and three values have only ten
    different bootstrap samples. The t test takes the differences as normal. A row that is not trained has the same
    score whatever the seed: its one cell serves all seeds.
    """
    lower, higher = pair
    result = Comparison(model, lower, higher, SEEDS, scope)
    wanted = list(tasks)
    low, high = (_seed_means(grid, model, row, wanted, other) for row, other in ((lower, higher), (higher, lower)))
    for row, values in ((lower, low), (higher, high)):
        if not values:
            return replace(result, reason=f"{row}: no result on all the tasks")
    seeds = sorted(low.keys() & high.keys())
    if not seeds:
        return replace(result, reason="no seed in common")
    differences = np.array([high[seed] - low[seed] for seed in seeds])
    result = _with_size(result, differences)
    if len(seeds) < 2:
        return replace(result, reason="one seed in common")
    if not np.isfinite(differences).all():
        return replace(result, reason="a score is not a number")
    if np.ptp(differences) < 1e-9:
        return replace(result, reason="the difference is the same for every seed")
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(1 - LEVEL)
    return _with_verdict(result, (float(interval.low), float(interval.high)), float(test.pvalue))


def _seed_means(grid: Grid, model: str, row: str, tasks: list[str], other: str) -> dict[int, float]:
    """Seed -> mean over the tasks; the one value of an untrained row for every seed of the ``other`` row."""
    entry = grid.entry(model, row, tasks)
    values = entry.values if entry else {}
    cells = grid.cells.get((model, row), {})
    if len(values) == 1 and not any(_trained(cell) for cell in cells.values()):
        (value,) = values.values()
        return dict.fromkeys(values.keys() | grid.cells.get((model, other), {}).keys(), value)
    return values


def _trained(cell: CellScores) -> bool:
    """Whether a seed matters: what ``notes["trained"]`` says, else whether one of the commands trains."""
    known = cell.notes.get("trained")
    if isinstance(known, bool):
        return known
    return not cell.commands or any(" train fit" in command for command in cell.commands)


def compare_queries(grid: Grid, model: str, pair: tuple[str, str], task: str) -> Comparison:
    """The paired bootstrap over queries: the sample is the difference of each query, averaged over seeds first.

    Resampling the difference of a query resamples both rows together. Percentile interval; p is twice the smaller tail
    of the bootstrap distribution at zero, so that it agrees with the interval. For tests over queries see arXiv
    1905.11096; for thousands of queries arXiv 2305.02461, which recommends looking at the size of the difference too.
    """
    lower, higher = pair
    result = Comparison(model, lower, higher, QUERIES, task)
    low, high = grid.queries(model, lower, task), grid.queries(model, higher, task)
    for row, values in ((lower, low), (higher, high)):
        if not values:
            return replace(result, reason=f"{row}: no scores for single queries")
    if low.keys() != high.keys():
        return replace(result, reason="the two rows were evaluated on different queries")
    differences = np.array([high[query] - low[query] for query in low])
    result = _with_size(result, differences)
    if len(differences) < 2:
        return replace(result, reason="one query")
    if not np.isfinite(differences).all():
        return replace(result, reason="a score is not a number")
    return _with_verdict(result, *paired_bootstrap(differences))


def paired_bootstrap(differences: np.ndarray, resamples: int = RESAMPLES) -> tuple[tuple[float, float], float]:
    """The mean of differences between two systems on the same sample.

    Args:
        differences: (Q,).
        resamples: the number of bootstrap samples.

    Returns:
        The 95 % percentile interval of the mean, and the two-sided p value of a mean of zero.
    """
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        confidence_level=1 - LEVEL,
        method="percentile",
        batch=max(1, 2_000_000 // len(differences)),  # 16 MB at a time
        rng=np.random.default_rng(0),  # the same results give the same report
    )
    means = drawn.bootstrap_distribution
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    interval = (float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))
    return interval, min(1.0, 2 * (tail + 1) / (resamples + 1))


def _with_size(result: Comparison, differences: np.ndarray) -> Comparison:
    agreeing = int((differences > 0).sum())
    return replace(result, difference=float(differences.mean()), size=len(differences), agreeing=agreeing)


def _with_verdict(result: Comparison, interval: tuple[float, float], p: float) -> Comparison:
    return replace(result, interval=interval, p=p, p_holm=p, verdict=_verdict(result.difference or 0.0, p))


def _verdict(difference: float, p: float) -> str:
    return UNCLEAR if p >= LEVEL else HOLDS if difference > 0 else REVERSED


def holm_corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """The same claims as one family: with Holm's step-down p values, and the verdicts that these give.

    In ascending order the i-th of m p values is multiplied by m - i + 1, and none may be below the one before it.
    """
    tested = sorted((c for c in comparisons if c.p is not None), key=lambda c: c.p or 0.0)
    adjusted: dict[int, float] = {}
    largest = 0.0
    for rank, comparison in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * (comparison.p or 0.0)))
        adjusted[id(comparison)] = largest
    return [
        c if c.p is None else replace(c, p_holm=adjusted[id(c)], verdict=_verdict(c.difference or 0.0, adjusted[id(c)]))
        for c in comparisons
    ]
