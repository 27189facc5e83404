"""Rows and queries to mine for."""

from __future__ import annotations

import pytest
from eval_helpers import write_jsonl
from mining_helpers import rows_of

from ullme.mining.rows import MiningRow, UnlabelledQueries, open_rows
from ullme.mining.text_hashes import hashes_of


def test_rows_know_the_positives_of_the_others(tmp_path):
    rows = rows_of(
        tmp_path,
        [
            {"query": "a", "pos": ["p1", "p2"], "neg": ["n"], "prompt": "find"},
            {"query": "b", "pos": ["p1"]},
            {"query": "a", "pos": ["p3", "P1 "]},
        ],
    )
    assert rows[0] == MiningRow("a", ("p1", "p2"), ("P1", "p1", "p2", "p3"), "find")
    assert rows[1] == MiningRow("b", ("p1",), ("p1",))
    assert (len(rows), rows.most_positives) == (3, 3)  # "P1 " is a copy of p1
    assert sorted(rows.positive_hashes.tolist()) == sorted(hashes_of(["p1", "p2", "p3"]).tolist())


def test_digest_says_which_rows(tmp_path):
    row = {"query": "a", "pos": ["p"], "neg": ["n"]}
    one = rows_of(tmp_path, [row]).digest
    assert rows_of(tmp_path, [{**row, "neg": ["other"]}]).digest == one  # negatives are replaced
    assert rows_of(tmp_path, [{**row, "pos": ["p", "q"]}]).digest != one
    assert rows_of(tmp_path, [{**row, "prompt": "find"}]).digest != one
    assert UnlabelledQueries({"1": "a"}, "").digest != UnlabelledQueries({"2": "a"}, "").digest


def test_queries():
    queries = UnlabelledQueries({"1": "a", "2": "b"}, "q.jsonl")
    assert (len(queries), queries[1], queries.labelled) == (2, MiningRow("b", id="2"), False)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"--rows '.*no.jsonl': no such file"):
        open_rows([str(tmp_path / "no.jsonl")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"--rows '.*empty.jsonl' holds no usable row"):
        open_rows([str(tmp_path / "empty.jsonl")])
    file = str(write_jsonl(tmp_path / "bad.jsonl", [{"query": "a", "pos": ["p"]}, {"query": "a", "pos": []}]))
    with pytest.raises(ValueError, match=r"bad.jsonl:2: no positive; fix the row or set --on_bad_row skip"):
        open_rows([file])
    assert len(open_rows([file], on_bad_row="skip")) == 1
    file = str(write_jsonl(tmp_path / "c.jsonl", [{"query": "a", "candidates": ["p", "q"]}]))
    with pytest.raises(ValueError, match=r"c.jsonl: the rows have no positives; give the queries as --queries"):
        open_rows([file])
