"""A corpus for BM25 alone, and the passages of rows as a corpus."""

from __future__ import annotations

import json

import pytest
from mining_helpers import rows_of
from search_helpers import corpus_of

from ullme.mining.corpus import bm25_folder, write_passages
from ullme.search import bm25


def test_a_folder_for_bm25(tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    corpus = corpus_of(tmp_path / "corpus.jsonl")
    shards = bm25_folder(corpus, tmp_path / "f", "en")
    assert (len(shards), shards.dimensions) == (10, 0)
    assert bm25.open_index(shards).search(["document n7"], 1)[1].tolist() == [[7]]
    built = []
    monkeypatch.setattr(bm25, "build_index", lambda *options: built.append(options[1]))
    bm25_folder(corpus, tmp_path / "f", "en")
    assert not built  # it is there
    bm25_folder(corpus, tmp_path / "f", "none")
    assert built == ["none"]
    with pytest.raises(
        ValueError, match=r"holds embeddings of another command: --corpus .* was '.* with 1?[0-9] documents"
    ):
        bm25_folder(corpus_of(tmp_path / "corpus.jsonl", 9), tmp_path / "f", "en")


def test_passages_of_rows(tmp_path):
    rows = rows_of(tmp_path, [{"query": "a", "pos": ["p"], "neg": ["n", "é"]}, {"query": "b", "pos": ["N", "p2"]}])
    write_passages(rows.source, tmp_path / "passages.jsonl")
    found = [json.loads(line) for line in (tmp_path / "passages.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["_id"], row["text"]) for row in found] == [("0", "p"), ("1", "n"), ("2", "é"), ("3", "p2")]
