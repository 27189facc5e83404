"""Options that nothing reads are named."""

from __future__ import annotations

import pytest

from ullme.commands import encode, index, mine, queries, search

CASES = [
    (search, ["f", "text", "--dense_weight=0.3"], "search: --dense_weight 0.3 is not used with --method dense"),
    (search, ["f", "text", "--method=bm25", "--max_length=9"], "search: --max_length 9 is not used with --method bm25"),
    (search, ["f", "text", "--method=bm25", "--device=cpu"], "search: --device cpu is not used with --method bm25"),
    (index, ["f", "--factory=none", "--bm25", "--queries=q"], "index: --queries q is not used with --factory none"),
    (index, ["f", "--stopwords=de"], "index: --stopwords de is not used without --bm25"),
    (mine, ["f", "--rows", "r", "--method=bm25", "--model=m"], "mine: --model m is not used with --method bm25"),
    (mine, ["f", "--rows", "r", "--text_columns", "a", "b"], "mine: --text_columns a b is not used without --corpus"),
    (mine, ["f", "--rows", "r", "--seed=3"], "mine: --seed 3 is not used with --sampling top"),
    (mine, ["f", "--rows", "r", "--method=bm25", "--device=cpu"], "mine: --device cpu is not used with --method bm25"),
    (mine, ["f", "--queries=q", "--stopwords=de"], "mine: --stopwords de is not used without a BM25 index to build"),
    (queries, ["llm", "--corpus=c", "--candidates=5"], "queries: --candidates 5 is not used with --round_trip bm25"),
    (
        queries,
        ["llm", "--corpus=c", "--held_out_share=0.3"],
        "queries: --held_out_share 0.3 is not used without --held",
    ),
    (
        queries,
        ["--corpus=c", "--query_source=titles", "--device=cpu"],
        "queries: --device cpu is not used without an LLM",
    ),
    (
        queries,
        ["llm", "--corpus=c", "--temperature=0", "--top_p=0.5"],
        "queries: --top_p 0.5 is not used with --temperature 0",
    ),
    (queries, ["--corpus=c", "--query_source=titles", "--seed=3"], "queries: --seed 3 is not used where nothing is"),
    (encode, ["llm", "--corpus=c", "--actors=2"], "encode: --actors 2 is not used with --engine local"),
]


@pytest.mark.parametrize(("command", "argv", "message"), CASES)
def test_an_option_that_is_not_used_is_named(command, argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    to = [] if command in (search, index) else ["--to=t.jsonl"]
    assert command.main([*argv, *to]) == 2  # no such file
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(message)
    assert len(lines) == 2


def test_options_that_are_used_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert search.main(["f", "text", "--method=fused", "--dense_weight=0.3", "--max_length=9"]) == 2
    assert mine.main(["--rows=r", "--corpus=c.jsonl", "--method=bm25", "--stopwords=de", "--to=t.jsonl"]) == 2
    likelihood = ["--likelihood=llm", "--device=cpu", "--dtype=float32"]
    assert mine.main(["f", "--rows=r", "--method=bm25", *likelihood, "--to=t.jsonl"]) == 2
    drawn = ["--query_source=titles", "--max_documents=2", "--seed=3"]
    assert queries.main(["--corpus=c", *drawn, "--to=t.jsonl"]) == 2
    assert "not used" not in capsys.readouterr().err
