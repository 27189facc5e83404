"""The weight of fusion that judged queries choose, and where a search finds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_helpers import StubEmbedder, encoded

from ullme.search import bm25
from ullme.search.encode import EncodeSettings
from ullme.search.fusion_weight import CANDIDATES, choose_weights, read_weight, write_weights
from ullme.search.searcher import Searcher
from ullme.search.shards import Shards

pytest.importorskip("bm25s")

# The stub finds a document by its whole text alone, and BM25 by a word of it.
TEXT = "title {0} text of document n{0}".format


@pytest.fixture
def searcher(tmp_path) -> Searcher:
    folder = encoded(tmp_path / "e", number=30, shard_rows=8)
    bm25.build_index(Shards(folder))
    return Searcher(folder, StubEmbedder(), device="cpu")


def test_bm25_alone_where_dense_search_finds_nothing(searcher):
    queries = {"a": "n3", "b": "n9", "not judged": "x"}
    chosen = choose_weights(searcher, queries, {"a": {"d3": 1}, "b": {"d9": 2}})["rrf"]
    assert chosen.queries == 2
    assert tuple(chosen.scores) == CANDIDATES
    assert chosen.scores[0.0] == 1.0
    assert chosen.scores[1.0] < 0.5
    # of equal ones the nearest to 0.5
    assert chosen.weight == max(weight for weight in CANDIDATES[:6] if chosen.scores[weight] == 1.0)
    assert f"dense weight {chosen.weight:g}, by nDCG@10 of 2 judged queries (0: 100.0, 0.1: " in str(chosen)


class Translator(StubEmbedder):
    """Takes a word that is in document 7 for the text of document 9."""

    def embed(self, texts, role, **options):
        return super().embed([TEXT(9) if text == "n7" else text for text in texts], role, **options)


def test_more_for_dense_search_where_bm25_is_wrong(searcher):
    translator = Searcher(searcher.shards.folder, Translator(), device="cpu")
    for chosen in choose_weights(translator, {"q": "n7"}, {"q": {"d9": 1}}).values():
        assert chosen.weight > 0.5
        assert chosen.scores[0.0] == 0
        assert chosen.scores[chosen.weight] == chosen.scores[1.0] == 1


def test_a_search_takes_the_folders_weight(searcher):
    folder, query = searcher.shards.folder, ["n3"]
    assert (searcher.dense_weight, read_weight(searcher.shards, "scores")) == (0.5, None)
    chosen = choose_weights(searcher, {"a": "n3"}, {"a": {"d3": 1}})
    write_weights(searcher.shards, chosen)
    for how in ("scores", "rrf"):
        again = Searcher(folder, StubEmbedder(), device="cpu", fusion=how)
        assert again.dense_weight == read_weight(again.shards, how) == chosen[how].weight
        assert Searcher(folder, StubEmbedder(), dense_weight=0.7, fusion=how).dense_weight == 0.7
    description = json.loads((Path(folder) / "fusion" / "index.json").read_text())["fusion"]["rrf"]
    assert description["queries"] == 1
    assert description["ndcg_at_10"]["0"] == 1.0
    stored = Path(folder) / "fusion" / "index.json"
    stored.write_text(
        stored.read_text().replace(f'"dense_weight": {chosen["scores"].weight}', '"dense_weight": 0.0', 1)
    )
    bm25_alone = Searcher(folder, StubEmbedder(), device="cpu")
    assert [hit.id for hit in bm25_alone.search(query, 5, "fused")[0]] == ["d3"]  # no other has the word


def test_a_weight_of_other_shards_is_refused(searcher, tmp_path):
    write_weights(searcher.shards, choose_weights(searcher, {"a": "n3"}, {"a": {"d3": 1}}))
    other = encoded(tmp_path / "other" / "e", number=30, settings=EncodeSettings(precision="float16"))
    (searcher.shards.folder / "fusion").rename(other / "fusion")
    with pytest.raises(ValueError, match="fusion is an index of other shards than are in"):
        Searcher(other, StubEmbedder()).search(["n3"], method="fused")


def test_judgements_of_other_queries_or_documents(searcher):
    with pytest.raises(ValueError, match=r"judges 1 queries that are not in --queries, first \['b'\]"):
        choose_weights(searcher, {"a": "n3"}, {"a": {"d3": 1}, "b": {"d3": 1}})
    with pytest.raises(ValueError, match=r"judges no document of .*, but such as \['x'\]"):
        choose_weights(searcher, {"a": "n3"}, {"a": {"x": 1}})
