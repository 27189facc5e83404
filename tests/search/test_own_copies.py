"""A query that is a document of the corpus is not found for itself: as in BEIR's ArguAna."""

from __future__ import annotations

import json
import math

import pytest
from search_helpers import StubEmbedder, encoded

from ullme.commands import search
from ullme.search import bm25
from ullme.search.fusion_weight import choose_weights
from ullme.search.own_copies import find_own_copies
from ullme.search.searcher import Searcher
from ullme.search.shards import Shards

pytest.importorskip("bm25s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = encoded(tmp_path_factory.mktemp("copies") / "e")
    bm25.build_index(Shards(folder))
    return folder


# The document d3 is "title 3 text of document n3".
QUERIES = {
    "d3": "text  of document n3",
    "d4": "title 4 text of document n4",
    "d5": "document n6",  # the same id by chance
    "d6": "another",
    "x": "text of document n7",
}


def test_same_id_and_same_text(folder):
    assert find_own_copies(Shards(folder), QUERIES) == {"d3", "d4"}


def test_the_command_leaves_them_out(folder, tmp_path, capsys):
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in QUERIES.items()))
    argv = [str(folder), f"--queries={file}", f"--to={tmp_path / 'h.jsonl'}", "--method=bm25", "--k=2"]
    assert search.main(argv) == 0
    assert "2 queries are documents with the same id and text; none is found for itself" in capsys.readouterr().out
    hits = {row["query"]: row["hits"] for row in map(json.loads, (tmp_path / "h.jsonl").read_text().splitlines())}
    found = {query: [hit["id"] for hit in own] for query, own in hits.items()}
    assert {query: len(own) for query, own in found.items()} == {"d3": 2, "d4": 2, "d5": 2, "d6": 0, "x": 2}
    assert found["x"][0] == "d7"
    assert "d3" not in found["d3"]
    assert "d4" not in found["d4"]


def test_the_weight_of_fusion_is_chosen_without_them(folder):
    """By BM25 d0 is the first document that shares a word, after the query's own."""
    searcher = Searcher(folder, StubEmbedder(), device="cpu")
    text = {"d4": "title 4 text of document n4"}
    assert choose_weights(searcher, text, {"d4": {"d4": 1}})["scores"].scores[1.0] == 1.0  # judged relevant
    first = choose_weights(searcher, text, {"d4": {"d0": 1}})["scores"].scores[0.0]
    second = choose_weights(searcher, {"q": text["d4"]}, {"q": {"d0": 1}})["scores"].scores[0.0]
    assert (first, second) == (1.0, pytest.approx(1 / math.log2(3)))
