"""Titles as queries."""

from __future__ import annotations

import json

import pytest

from ullme.commands import queries
from ullme.commands.queries import write_queries
from ullme.query_generation.titles import TitleWriter, read_titles, without_titles
from ullme.query_generation.writer import WriteSettings
from ullme.search.corpus import Columns, open_corpus

ROWS = [
    {"_id": "a", "title": "Wings  in\na slipstream", "text": "lift of a wing behind a propeller in a slipstream"},
    {"_id": "b", "title": "", "text": "a text without a title"},
    {"_id": "c", "title": "heat transfer at a plate", "text": "laminar flow past a plate transfers heat"},
    {"_id": "d", "title": "A title alone", "text": ""},
    {"_id": "e", "title": "Editorial", "text": "words of the publisher"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_title_is_the_query_and_the_text_without_it_the_positive(file, tmp_path):
    pytest.importorskip("bm25s")
    corpus = open_corpus(str(file))
    titles = read_titles(corpus)
    assert titles["a"] == "Wings in a slipstream"
    assert sorted(titles) == ["a", "c", "d", "e"]
    kept, documents = write_queries(TitleWriter(titles), without_titles(corpus), tmp_path / "q.jsonl", WriteSettings())
    assert documents == 4  # d has no text to find
    assert kept.counts == {"kept": 2, "empty": 1, "inconsistent": 1}  # "Editorial" is in no text
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(row["query"], row["pos"], row["pos_ids"]) for row in rows] == [
        (titles[key], [text["text"]], [key]) for key, text in (("a", ROWS[0]), ("c", ROWS[2]))
    ]


def test_the_command_needs_no_llm(file, tmp_path, capsys):
    to = tmp_path / "q.jsonl"
    given = ["--corpus", str(file), "--to", str(to), "--query_source=titles", "--round_trip=none"]
    assert queries.main(given) == 0
    assert "q.jsonl: 3 queries for 4 documents; 1 are empty" in capsys.readouterr().out
    assert [json.loads(line)["pos_ids"] for line in to.read_text().splitlines()] == [["a"], ["c"], ["e"]]


MISTAKES = [
    (["--query_source=headings"], "--query_source headings: choose llm or titles"),
    (["--query_source=titles", "--temperature=1"], "writes nothing, so --temperature does nothing; leave it out"),
    (["--query_source=titles", "--document_max_length=9"], "so --document_max_length does nothing; leave it out"),
    (["--query_source=titles", "--round_trip=likelihood"], "--round_trip likelihood, and for nothing else; name one"),
    (["some/llm", "--query_source=titles"], "and for nothing else; leave out 'some/llm'"),
    (["--query_source=titles", "--round_trip=none", "--text_columns", "text"], "--text_columns names 'text' alone"),
    (
        ["--query_source=titles", "--round_trip=none", "--text_columns", "head", "text"],
        "no document of {corpus} has a 'h",
    ),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistakes_are_one_line(argv, message, file, tmp_path, capsys):
    assert queries.main([*argv, "--corpus", str(file), "--to", str(tmp_path / "q.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message.format(corpus=file) in error
    assert error.count("\n") == 1


def test_other_columns(file):
    corpus = open_corpus(str(file), columns=Columns(text=("title", "text", "text")))
    assert next(without_titles(corpus).documents())[1].text == f"{ROWS[0]['text']} {ROWS[0]['text']}"
