"""nDCG@10 by hand."""

from __future__ import annotations

import math

import pytest

from ullme.search.ndcg import ndcg_at_10

QRELS = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"a": 1}, "q3": {"b": 1}}


def test_ndcg_by_hand():
    found = {"q1": ["b", "x", "a"], "q2": [f"x{n}" for n in range(10)] + ["a"]}
    ideal = 2 + 1 / math.log2(3)
    assert ndcg_at_10(found, QRELS) == pytest.approx({"q1": (1 + 2 / math.log2(4)) / ideal, "q2": 0.0, "q3": 0.0})
    assert ndcg_at_10({"q2": ["x", "a"]}, QRELS)["q2"] == pytest.approx(1 / math.log2(3))
