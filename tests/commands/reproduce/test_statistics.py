from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic_cells import cell, table

from ullme.commands.reproduce.statistics import (
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
    paired_bootstrap,
)

PAIR = ("a", "b")


def seeds_of(row, *scores, **more):
    return [cell("m", row, seed, sts=score, **more) for seed, score in enumerate(scores)]


def test_mean_and_deviation_over_seeds_by_hand():
    entry = Grid.of(seeds_of("a", 0.40, 0.42, 0.47)).entry("m", "a", ["sts"])
    assert entry.mean == pytest.approx(43)
    assert entry.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))  # S - 1
    assert Grid.of(seeds_of("a", 0.4)).entry("m", "a", ["sts"]).deviation is None


def test_average_counts_tasks_not_types():
    grid = Grid.of([cell(dev=0.2, news=0.4, sts=0.9)])
    assert grid.entry("m", "a", ["dev", "news", "sts"]).mean == pytest.approx(50)


def test_a_seed_without_all_tasks_is_in_no_average():
    grid = Grid.of([cell(seed=0, dev=0.2, sts=0.4), cell(seed=1, dev=0.9)])
    entry = grid.entry("m", "a", ["dev", "sts"])
    assert (entry.mean, entry.values, entry.partial) == (pytest.approx(30), {0: pytest.approx(30)}, {1: (90.0, 1)})
    assert grid.entry("m", "a", ["news"]) is None
    assert grid.entry("m", "b", ["dev"]) is None


def test_results_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="two results"):
        Grid.of([cell(), cell()])
    other = cell(row="b", sts=0.5)
    other.tasks[0] = type(other.tasks[0])("sts", "STS", "pearson", 0.5)
    with pytest.raises(ValueError, match=r"'cosine_spearman'.*'pearson'"):
        Grid.of([cell(sts=0.4), other])


def test_claims_are_neighbours_and_ends():
    assert claims(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("a", "c")]
    assert claims(["a", "b"]) == [("a", "b")]


def test_seeds_by_hand():
    # differences 1, 2, 3 points: mean 2, s = 1, t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(2 + t^2)
    grid = Grid.of([*seeds_of("a", 0.40, 0.45, 0.50), *seeds_of("b", 0.41, 0.47, 0.53)])
    found = compare_seeds(grid, "m", PAIR, "STS", ["sts"])
    t = 2 * math.sqrt(3)
    assert (found.difference, found.size, found.agreeing) == (pytest.approx(2), 3, 3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    half = 4.302652730 / math.sqrt(3)  # the 97.5 % quantile of t with 2 degrees of freedom
    assert found.interval == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert found.verdict == UNCLEAR


def test_seeds_are_paired():
    """The seeds differ by 40 points, the rows by one: only the paired test sees it."""
    grid = Grid.of([*seeds_of("a", 0.2, 0.4, 0.6), *seeds_of("b", 0.2101, 0.41, 0.6099)])
    assert compare_seeds(grid, "m", PAIR, "STS", ["sts"]).verdict == HOLDS
    assert compare_seeds(grid, "m", ("b", "a"), "STS", ["sts"]).verdict == REVERSED


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([0.4], [0.5], "one seed"),
        ([0.4, 0.5], [], "b: no result"),
        ([0.4, 0.5], [0.4, 0.5], "the same for every seed"),
        ([0.4, 0.5], [0.5, math.nan], "not a number"),
    ],
)
def test_seeds_that_cannot_be_tested(a, b, reason):
    found = compare_seeds(Grid.of([*seeds_of("a", *a), *seeds_of("b", *b)]), "m", PAIR, "STS", ["sts"])
    assert (found.verdict, found.p) == (UNTESTED, None)
    assert reason in found.reason


def test_the_one_cell_of_an_untrained_row_serves_every_seed():
    trained = seeds_of("b", 0.50, 0.52, 0.54, commands=["python -m ullme train fit"])
    untrained = seeds_of("a", 0.40, commands=["python -m ullme evaluate"])
    found = compare_seeds(Grid.of([*untrained, *trained]), "m", PAIR, "STS", ["sts"])
    assert (found.size, found.difference, found.verdict) == (3, pytest.approx(12), HOLDS)
    one_of_three = seeds_of("a", 0.40, commands=["python -m ullme train fit"])
    assert compare_seeds(Grid.of([*one_of_three, *trained]), "m", PAIR, "STS", ["sts"]).verdict == UNTESTED


def queries(row, scores, seed=0):
    return cell("m", row, seed, {"dev": {f"q{n}": score for n, score in enumerate(scores)}}, dev=0.5)


def test_clear_difference_over_queries():
    low, high = [0.1, 0.3, 0.5, 0.7, 0.2] * 8, [0.2, 0.5, 0.6, 0.9, 0.3] * 8
    grid = Grid.of([queries("a", low), queries("b", high)])
    found = compare_queries(grid, "m", PAIR, "dev")
    assert (found.difference, found.size, found.agreeing) == (pytest.approx(14), 40, 40)
    assert found.interval[0] > 0
    assert found.p == pytest.approx(2 / 10_000)  # no resample reaches zero
    assert found.verdict == HOLDS
    assert compare_queries(grid, "m", ("b", "a"), "dev").verdict == REVERSED


def test_no_difference_over_queries():
    scores = [0.1, 0.9, 0.5, 0.3]
    same = compare_queries(Grid.of([queries("a", scores), queries("b", scores)]), "m", PAIR, "dev")
    assert (same.difference, same.interval, same.p, same.verdict) == (0, (0, 0), 1, UNCLEAR)
    swapped = compare_queries(Grid.of([queries("a", scores), queries("b", [0.9, 0.1, 0.5, 0.3])]), "m", PAIR, "dev")
    assert (swapped.difference, swapped.verdict) == (pytest.approx(0), UNCLEAR)


def test_queries_are_averaged_over_seeds_first():
    cells = [queries("a", [0.2, 0.4], 0), queries("a", [0.4, 0.8], 1), queries("b", [0.5, 0.5], 0)]
    assert Grid.of(cells).queries("m", "a", "dev") == {"q0": pytest.approx(30), "q1": pytest.approx(60)}
    assert compare_queries(Grid.of(cells), "m", PAIR, "dev").difference == pytest.approx(5)


def test_different_queries_are_not_compared():
    found = compare_queries(Grid.of([queries("a", [0.1, 0.2]), queries("b", [0.3, 0.4, 0.5])]), "m", PAIR, "dev")
    assert (found.verdict, found.difference) == (UNTESTED, None)
    assert "different queries" in found.reason


def test_bootstrap_of_two_values_is_known():
    """Means of two drawn from {-1, 3} are -1, 1, 3 with chances 1/4, 1/2, 1/4."""
    interval, p = paired_bootstrap(np.array([-1.0, 3.0]), resamples=4000)
    assert interval == (-1, 3)
    assert p == pytest.approx(2 / 4, abs=0.04)


def test_bootstrap_interval_of_many_normal_values():
    differences = np.random.default_rng(1).normal(1, 2, 400)
    interval, _ = paired_bootstrap(differences)
    half = 1.96 * differences.std() / 20
    assert interval == (
        pytest.approx(differences.mean() - half, abs=0.02),
        pytest.approx(differences.mean() + half, abs=0.02),
    )


def test_holm_by_hand():
    p = [0.01, 0.04, 0.03, None]
    made = [Comparison("m", "a", "b", "seeds", str(n), 1.0, (0.5, 1.5), x, x, 3, 3, HOLDS) for n, x in enumerate(p)]
    found = holm_corrected(made)
    assert [c.p_holm for c in found] == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06), None]
    assert [c.verdict for c in found] == [HOLDS, UNCLEAR, UNCLEAR, HOLDS]
    assert [c.p for c in found] == p


def test_synthetic_cells_rise():
    grid = Grid.of(table(["a", "b"]))
    assert compare_seeds(grid, "m", PAIR, "Average", ["dev", "sts"]).difference == pytest.approx(5, abs=1)
