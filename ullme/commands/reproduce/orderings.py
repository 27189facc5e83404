"""Which of the claimed orderings of rows hold in the results, as text and as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence

from ullme.commands.reproduce.statistics import (
    AVERAGE,
    HOLDS,
    REVERSED,
    UNCLEAR,
    UNTESTED,
    Comparison,
    Grid,
    claims,
    compare_queries,
    compare_seeds,
    holm_corrected,
)
from ullme.commands.reproduce.tables import UNKNOWN, markdown, number

METHOD = """\
Each claim is that the row on the left scores less than the row on the right: every two neighbours of the claimed \
order, and its two ends. A difference is right minus left, in points.

- **holds**: the difference is positive and significant. **does not hold**: it is negative and significant. \
**not significant**: neither. **not tested**: results are missing, or there is nothing to test with.
- Significant means p < 0.05, two-sided, after Holm's correction over the claims of one table column or one task. The \
95 % intervals are not corrected.
- Over seeds: a t test on the differences paired by seed, which takes them as normal. It asks whether another training \
would show the same order. With three seeds a bootstrap or a sign-flip test cannot answer that.
- Over queries: the paired bootstrap (9,999 resamples) of each query's metric, averaged over the seeds first. It asks \
whether other queries of the same kind would show the same order for these trained models.
"""


def compare(
    grid: Grid, models: Sequence[str], order: list[str], columns: Mapping[str, Sequence[str]]
) -> tuple[list[Comparison], list[Comparison]]:
    """Every claim on every model: (over seeds, for each column; over queries, for each task that has them)."""
    seeds, queries = [], []
    for model in models:
        for name, tasks in columns.items():
            seeds += holm_corrected([compare_seeds(grid, model, pair, name, tasks) for pair in claims(order)])
        for task in grid.query_tasks():
            queries += holm_corrected([compare_queries(grid, model, pair, task) for pair in claims(order)])
    return seeds, queries


def text(
    seeds: list[Comparison], queries: list[Comparison], models: dict[str, str], rows: dict[str, str], order: list[str]
) -> str:
    """The report's section about the orderings."""
    parts = [f"Claimed: {' < '.join(rows[row] for row in order)}.\n", METHOD]
    for model, label in models.items():
        parts.append(f"### {label}\n")
        averages = [c for c in seeds if c.model == model and c.scope == AVERAGE]
        parts += [_summary("Average over the tasks, over seeds", averages), _table(averages, rows, scope=False)]
        if found := [c for c in queries if c.model == model]:
            parts += [_summary("Single tasks, over queries", found), _table(found, rows, scope=True)]
    return "\n".join(parts)


def _summary(what: str, comparisons: list[Comparison]) -> str:
    counts = Counter(c.verdict for c in comparisons)
    verdicts = [f"{verdict} {counts[verdict]}" for verdict in (HOLDS, REVERSED, UNCLEAR, UNTESTED) if counts[verdict]]
    return f"**{what}**, of {len(comparisons)} claims: {', '.join(verdicts)}.\n"


def _table(comparisons: list[Comparison], rows: dict[str, str], scope: bool) -> str:
    unit = "queries" if scope else "seeds"
    head = ["claim", *(["task"] if scope else []), "difference", "95 % interval", "p", "p (Holm)"]
    head += [f"{unit} in favour", "verdict"]
    lines = [head]
    for c in comparisons:
        interval = f"[{number(c.interval[0], True)}, {number(c.interval[1], True)}]" if c.interval else UNKNOWN
        favour = f"{c.agreeing} of {c.size}" if c.size else UNKNOWN
        verdict = f"{c.verdict} ({_with_label(c.reason, rows)})" if c.reason else c.verdict
        claim = f"{rows[c.lower]} < {rows[c.higher]}"
        lines.append([claim, *([c.scope] if scope else []), number(c.difference, True), interval])
        lines[-1] += [_p(c.p), _p(c.p_holm), favour, verdict]
    return markdown(lines)


def _p(value: float | None) -> str:
    return UNKNOWN if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _with_label(reason: str, rows: dict[str, str]) -> str:
    """The reason with the row's label in place of its id."""
    row, colon, rest = reason.partition(": ")
    return f"{rows[row]}: {rest}" if colon and row in rows else reason


def as_csv(comparisons: list[Comparison], models: dict[str, str], rows: dict[str, str]) -> str:
    """One line a comparison, numbers unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["model", "lower", "higher", "level", "scope", "difference", "interval_low", "interval_high"]
    writer.writerow([*head, "p", "p_holm", "size", "agreeing", "verdict", "reason"])
    for c in comparisons:
        writer.writerow(
            [
                *(models[c.model], rows[c.lower], rows[c.higher], c.level, c.scope, c.difference),
                *(c.interval or (None, None)),
                *(c.p, c.p_holm, c.size, c.agreeing, c.verdict, _with_label(c.reason, rows)),
            ]
        )
    return out.getvalue()
