"""Files of queries in, files of results out."""

from __future__ import annotations

import errno
import gzip
import json

import pytest

from ullme.search.queries import Hit, check_ids, check_output, read_queries, write_hits
from ullme.utils import atomic_files


def test_both_formats_of_queries(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"_id": "a", "text": " first "}\n\n{"id": 2, "query": "second"}\n')
    (tmp_path / "q.tsv").write_text("a\tfirst\n2\tsecond\n")
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress((tmp_path / "q.jsonl").read_bytes()))
    for name in ("q.jsonl", "q.jsonl.gz", "q.tsv"):
        assert read_queries(tmp_path / name) == {"a": "first", "2": "second"}


def test_a_table_may_name_its_columns(tmp_path):
    (tmp_path / "q.tsv").write_text("query_id\tQuery\nid\ttext\n1\tfirst\n")
    assert read_queries(tmp_path / "q.tsv") == {"id": "text", "1": "first"}  # only the first line is no query


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", "\n", "q.jsonl holds no query; give at least one"),
        ("q.jsonl", '{"_id": "a", "text": "b"}\n{"_id": "a", "text": "c"}', "q.jsonl:2: duplicate query id 'a'"),
        ("q.jsonl", '{"_id": "a", "text": " "}', "q.jsonl:1: the id or the text of the query is empty"),
        ("q.jsonl", '{"_id": "a"}', r"q.jsonl:1: a query needs '_id' and 'text', and the row has \['_id'\]"),
        ("q.jsonl", "[]", "q.jsonl:1: the row is a list"),
        ("q.tsv", "a first", "q.tsv:1: expected the query's id, a tab and its text"),
    ],
)
def test_bad_queries_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_queries(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_queries(tmp_path / "none.tsv")


HITS = {"q1": [Hit(0.5, "d1", "one"), Hit(0.25, "d 2", "two")], "q2": []}


def test_a_trec_run(tmp_path):
    hits = {"q1": [Hit(0.5, "d1", "one"), Hit(1 / 3, "d2", "two")], "q2": []}
    write_hits(tmp_path / "run.trec", hits, "tag")
    assert (tmp_path / "run.trec").read_text() == "q1 Q0 d1 1 0.5 tag\nq1 Q0 d2 2 0.333333333 tag\n"
    with pytest.raises(ValueError, match=r"the id 'd 2' holds white space.*to a \.jsonl file"):
        write_hits(tmp_path / "other.trec", HITS, "tag")
    assert not (tmp_path / "other.trec").exists()


def test_ids_that_a_trec_run_cannot_hold():
    for bad in ("a\tb", "a b", ""):
        with pytest.raises(ValueError, match=r"holds white space, which separates .* write --to a \.jsonl file"):
            check_ids("run.trec", ["a", bad])
    check_ids("run.trec", ["a", "b"])
    check_ids("run.jsonl", ["a b"])


def test_a_full_disk_leaves_no_half_result(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    with pytest.raises(ValueError, match=r"run.jsonl' cannot be written \(No space left on device\); free space"):
        write_hits(tmp_path / "run.jsonl", HITS, "tag")
    assert not list(tmp_path.iterdir())


def test_json_lines(tmp_path):
    write_hits(tmp_path / "run.jsonl", HITS, "tag")
    first, second = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert first == {"query": "q1", "hits": [hit._asdict() for hit in HITS["q1"]]}
    assert second == {"query": "q2", "hits": []}


def test_the_name_of_the_output_says_its_format(tmp_path):
    check_output(tmp_path / "run.trec")
    with pytest.raises(ValueError, match=r"--to .*run.csv: name it \.trec .* or \.jsonl"):
        check_output(tmp_path / "run.csv")
