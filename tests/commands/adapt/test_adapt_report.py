"""What was found, and the table."""

from __future__ import annotations

import json

from ullme.commands.adapt.report import read_found, table


def test_found(tmp_path):
    hits = [{"score": 1.0, "id": "a", "text": "t"}, {"score": 0.5, "id": "b", "text": "one\u2028two\x85"}]
    rows = [{"query": "q1", "hits": hits}, {"query": "q2", "hits": []}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]  # as `ullme search` writes them
    (tmp_path / "f.jsonl").write_text("".join(lines), encoding="utf-8")
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
