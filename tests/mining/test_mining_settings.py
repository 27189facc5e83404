"""Margins by hand, and settings that make no sense."""

from __future__ import annotations

import numpy as np
import pytest

from ullme.mining.settings import MiningSettings, check_method

SCORES = np.array([0.9, 0.5, 0.48, 0.475, 0.47, 0.1, -0.2, -np.inf], dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "positive", "expected"),
    [
        ({}, 0.5, [0, 1, 2, 3, 4, 5, 6]),
        ({"relative_margin": 0.05}, 0.5, [3, 4, 5, 6]),  # 0.475 at the most
        ({"relative_margin": 0.0}, 0.5, [1, 2, 3, 4, 5, 6]),
        ({"relative_margin": 0.5}, -0.1, [6]),  # -0.15 at the most: below a negative score too
        ({"relative_margin": 1.0}, 0.2, [6]),
        ({"absolute_margin": 0.4}, 0.5, [5, 6]),
        ({"absolute_margin": 0.0}, 0.48, [2, 3, 4, 5, 6]),
        ({"max_score": 0.5, "min_score": 0.1}, None, [1, 2, 3, 4, 5]),
        ({"relative_margin": 0.05, "absolute_margin": 0.03}, 0.5, [4, 5, 6]),
        ({"range_min": 2, "max_score": 0.6}, None, [3, 4, 5, 6]),  # the best that are left are left out
    ],
)
def test_margins(options, positive, expected):
    assert MiningSettings(1, **options).window(SCORES, positive, 10).tolist() == expected


def test_range():
    assert MiningSettings(1, range_min=1, range_max=3).window(SCORES, None, 3).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "positives", "expected"),
    [
        ({}, 1, (6, 7)),
        ({"range_min": 3}, 2, (10, 12)),
        ({"relative_margin": 0.05}, 1, (51, 52)),
        ({"sampling": "random"}, 0, (50, 50)),
        ({"range_max": 20, "relative_margin": 0.05}, 3, (20, 23)),
    ],
)
def test_depth(options, positives, expected):
    assert MiningSettings(5, **options).depth(positives) == expected


def test_order():
    places = np.arange(20)
    assert MiningSettings().order(places, 7).tolist() == list(range(20))
    drawn = [MiningSettings(sampling="random", seed=seed).order(places, key).tolist() for seed, key in [(0, 7)] * 2]
    others = [
        MiningSettings(sampling="random", seed=seed).order(places, key).tolist() for seed, key in [(1, 7), (0, 8)]
    ]
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == list(range(20)) != drawn[0]
    assert drawn[0] not in others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "--num_negatives 0 must be at least 1"),
        ({"range_min": -1}, "--range_min -1 must not be negative"),
        ({"seed": -1}, "--seed -1 must not be negative"),
        (
            {"num_negatives": 5, "range_min": 8, "range_max": 10},
            "--num_negatives 5: --range_min 8 and --range_max 10 leave 2 documents for a query; widen the range",
        ),
        ({"range_min": 9, "range_max": 2}, "leave 0 documents"),
        ({"sampling": "best"}, "--sampling best: choose top or random"),
        ({"relative_margin": 1.5}, "--relative_margin 1.5: give a share of the positive's score from 0 to 1; 0.05"),
        ({"relative_margin": -0.1}, "--relative_margin -0.1: give a share"),
        ({"absolute_margin": -0.1}, "--absolute_margin -0.1 would keep negatives above the positive; give 0 or more"),
        ({"max_score": float("nan")}, "--max_score nan must be a number"),
        ({"likelihood_margin": float("inf")}, "--likelihood_margin inf must be a number"),
        ({"max_score": 0.1, "min_score": 0.2}, "--min_score 0.2 is above --max_score 0.1; no score is between"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MiningSettings(**options).check()


@pytest.mark.parametrize("name", ["relative_margin", "absolute_margin", "likelihood_margin"])
def test_margins_need_positives(name):
    with pytest.raises(ValueError, match=rf"--{name} 0.1 compares with a query's positive, and --queries have none"):
        MiningSettings(**{name: 0.1}).check_unlabelled()


def test_methods():
    check_method("bm25")
    with pytest.raises(ValueError, match="--method fused: choose dense or bm25"):
        check_method("fused")
