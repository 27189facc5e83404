"""nDCG@10 by hand, and the table."""

from __future__ import annotations

import json
import math

import pytest

from ullme.commands.adapt.report import ndcg_at_10, read_found, table

QRELS = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"a": 1}, "q3": {"b": 1}}


def test_ndcg_by_hand():
    found = {"q1": ["b", "x", "a"], "q2": [f"x{n}" for n in range(10)] + ["a"]}
    ideal = 2 + 1 / math.log2(3)
    assert ndcg_at_10(found, QRELS) == pytest.approx({"q1": (1 + 2 / math.log2(4)) / ideal, "q2": 0.0, "q3": 0.0})
    assert ndcg_at_10({"q2": ["x", "a"]}, QRELS)["q2"] == pytest.approx(1 / math.log2(3))


def test_found(tmp_path):
    hits = [{"score": 1.0, "id": "a", "text": "t"}, {"score": 0.5, "id": "b", "text": "t"}]
    rows = [{"query": "q1", "hits": hits}, {"query": "q2", "hits": []}]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_found(tmp_path / "f.jsonl") == {"q1": ["a", "b"], "q2": []}


def test_table():
    scores = {"before": {"q1": 0.0, "q2": 0.5}, "adapted": {"q2": 1.0, "q1": 0.5}}
    assert table(scores, [("adapted", "before")]).splitlines() == [
        "nDCG@10 of 2 queries",
        "before             25.0 [0.0, 50.0]",
        "adapted            75.0 [50.0, 100.0]",
        "adapted - before  +50.0 [+50.0, +50.0]",
    ]
    assert table({"before": {"q1": 1.0}}, []).splitlines()[1].split() == ["before", "100.0"]
