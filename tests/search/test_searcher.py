"""Dense, BM25 and fused search over a folder, and indexes beside it."""

from __future__ import annotations

import builtins
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from search_helpers import StubEmbedder, encoded

from ullme.search import bm25, faiss_index
from ullme.search.encode import EncodeSettings
from ullme.search.searcher import Searcher
from ullme.search.shards import Shards
from ullme.search.topk import exact_top_k
from ullme.utils.atomic_files import StorageError

# The stub embeds equal texts equally, so a document's own text finds it.
TEXT = "title {0} text of document n{0}".format


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return encoded(tmp_path_factory.mktemp("searcher") / "e", number=30, shard_rows=8)


@pytest.fixture
def own_folder(tmp_path) -> Path:
    return encoded(tmp_path / "e", number=30, shard_rows=8)


def ids(hits) -> list[str]:
    return [hit.id for hit in hits]


def test_dense_search_finds_a_text_by_itself(folder):
    searcher = Searcher(folder, StubEmbedder(), device="cpu")
    first, second = searcher.search([TEXT(17), TEXT(3)], 5)
    assert (ids(first)[0], ids(second)[0], len(first)) == ("d17", "d3", 5)
    assert first[0].score == pytest.approx(1)
    assert first[0].text == TEXT(17)
    assert all(a.score > b.score for a, b in pairwise(first))
    assert len(searcher.search([TEXT(1)], 99)[0]) == 30  # all there are


@pytest.mark.parametrize("settings", [EncodeSettings(truncate_dim=8), EncodeSettings(precision="int8")])
def test_queries_are_embedded_as_the_folder_is(settings, tmp_path):
    searcher = Searcher(encoded(tmp_path / "e", settings=settings), StubEmbedder(), device="cpu")
    assert ids(searcher.search([TEXT(7)], 1)[0]) == ["d7"]


def test_another_model_is_refused(folder):
    with pytest.raises(ValueError, match=r"encoded by 'stub', revision 1, and 'stub' has revision 2 now; .*--model"):
        Searcher(folder, StubEmbedder(version="2")).search(["a"])


def test_bad_arguments(folder):
    searcher = Searcher(folder, StubEmbedder())
    with pytest.raises(ValueError, match="--k 0 must be at least 1"):
        searcher.search(["a"], 0)
    with pytest.raises(ValueError, match="--method sparse: choose dense, bm25, fused"):
        searcher.search(["a"], method="sparse")
    with pytest.raises(ValueError, match=r"--dense_weight 1.5 must be from 0 \(BM25 alone\) to 1"):
        Searcher(folder, StubEmbedder(), dense_weight=1.5)
    with pytest.raises(ValueError, match="--fusion x: choose scores, rrf"):
        Searcher(folder, StubEmbedder(), fusion="x")
    with pytest.raises(ValueError, match=r"has no BM25 index; build it with `ullme index .* --bm25`"):
        searcher.search(["a"], method="bm25")


def test_bm25_and_fusion(own_folder):
    pytest.importorskip("bm25s")
    shards = Shards(own_folder)
    index = bm25.build_index(shards)
    scores, rows = index.search(["document n17", "nothing in common", "", "document"], 3)
    assert rows[0, 0] == 17
    assert scores[0, 0] > scores[0, 1] > 0
    assert rows[1].tolist() == rows[2].tolist() == [-1, -1, -1]
    assert rows[3].tolist() == [0, 1, 2]  # all 30 are equal
    assert np.isneginf(scores[1]).all()
    searcher = Searcher(own_folder, StubEmbedder(), device="cpu")
    assert ids(searcher.search(["document n17"], 1, "bm25")[0]) == ["d17"]
    query = [TEXT(17)]
    by_ranks = Searcher(own_folder, StubEmbedder(), device="cpu", fusion="rrf")
    ranks = {way: ids(by_ranks.search(query, 30, way)[0]) for way in ("dense", "bm25", "fused")}
    assert ranks["fused"][0] == "d17"
    assert ids(searcher.search(query, 30, "fused")[0]) != ranks["fused"]  # by scores
    assert ranks["dense"] != ranks["bm25"]
    by_hand = {d: 1 / (61 + ranks["dense"].index(d)) + 1 / (61 + ranks["bm25"].index(d)) for d in ranks["bm25"]}
    assert ranks["fused"] == sorted(by_hand, key=lambda d: (-by_hand[d], int(d[1:])))
    for weight, way in ((0, "bm25"), (1, "dense")):
        weighted = Searcher(own_folder, StubEmbedder(), device="cpu", dense_weight=weight)
        assert ids(weighted.search(query, 30, "fused")[0]) == ranks[way]


def test_stop_words_of_no_language(own_folder):
    pytest.importorskip("bm25s")
    with pytest.raises(ValueError, match=r"--stopwords klingon: .*give a language such as en, or none"):
        bm25.build_index(Shards(own_folder), "klingon")


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF2,Flat", "IDMap,Flat", "IDMap2,Flat"])
def test_faiss_indexes(factory, own_folder):
    pytest.importorskip("faiss")
    shards = Shards(own_folder)
    parameters = {"HNSW8": "efSearch=64", "IVF2,Flat": "nprobe=2"}.get(factory, "")  # then each looks at all
    index = faiss_index.build_index(shards, factory, parameters)
    queries = faiss_index.sample_queries(shards, 9)
    assert faiss_index.recall(index, shards, queries, 10) == 1.0
    scores, rows = index.search(queries, 40)
    exact = exact_top_k(queries, shards.blocks(), 40)
    assert np.allclose(scores[:, :30], exact[0][:, :30], atol=1e-6)
    assert np.isneginf(scores[:, 30:]).all()
    assert (rows[:, 30:] == -1).all()
    searcher = Searcher(own_folder, StubEmbedder(), device="cpu")
    assert searcher.index is not None
    assert ids(searcher.search([TEXT(4)], 2)[0]) == ids(
        Searcher(own_folder, StubEmbedder(), device="cpu", exact=True).search([TEXT(4)], 2)[0]
    )


def test_recall_counts_what_an_index_misses(folder):
    shards = Shards(folder)
    queries = faiss_index.sample_queries(shards, 30)
    true = exact_top_k(queries, shards.blocks(), 10)[1]

    class Half:
        def search(self, queries, k):
            return None, np.concatenate([true[:, :5], np.full((30, 5), -1)], axis=1)

    assert faiss_index.recall(Half(), shards, queries, 10) == 0.5


def test_an_index_that_faiss_cannot_make(own_folder):
    pytest.importorskip("faiss")
    shards = Shards(own_folder)
    with pytest.raises(ValueError, match=r"--factory Nonsense: FAISS cannot make it"):
        faiss_index.build_index(shards, "Nonsense")
    with pytest.raises(ValueError, match=r"--parameters colour=1: the index does not have it"):
        faiss_index.build_index(shards, "Flat", "colour=1")
    with pytest.raises(ValueError, match=r"--factory IVF64,Flat cannot be trained on 30 vectors"):
        faiss_index.build_index(shards, "IVF64,Flat")
    assert not (own_folder / "faiss").exists()


def test_an_index_that_takes_no_vectors(own_folder, monkeypatch):
    """As the index of IDMap,PQ8x4fs,RFlat in some releases of FAISS (its issue 3893)."""
    faiss = pytest.importorskip("faiss")

    class Refusing:
        is_trained = True

        def add(self, vectors):
            raise RuntimeError("Error in void faiss::Index::add at Index.cpp:75: add does not make sense")

    monkeypatch.setattr(faiss, "index_factory", lambda *_: Refusing())
    message = r"--factory Odd: FAISS cannot add vectors to it \(add does not make sense\)"
    with pytest.raises(ValueError, match=message):
        faiss_index.build_index(Shards(own_folder), "Odd")
    assert not (own_folder / "faiss").exists()


def test_an_index_of_other_shards_or_a_truncated_one(own_folder, tmp_path):
    pytest.importorskip("bm25s")
    bm25.build_index(Shards(own_folder))
    file = max((own_folder / "bm25").iterdir(), key=lambda p: p.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} is missing or truncated; run `ullme index"):
        bm25.open_index(Shards(own_folder))
    file.write_bytes(whole)
    bm25.open_index(Shards(own_folder))
    other = encoded(tmp_path / "other" / "e", number=29)
    (own_folder / "bm25").rename(other / "bm25")
    with pytest.raises(ValueError, match=r"an index of other shards than are in .* now; run `ullme index"):
        bm25.open_index(Shards(other))
    description = other / "bm25" / "index.json"
    description.write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        bm25.open_index(Shards(other))


def test_a_full_disk_while_an_index_is_written(own_folder, monkeypatch):
    bm25s = pytest.importorskip("bm25s")
    bm25.build_index(Shards(own_folder))
    before = (own_folder / "bm25" / "index.json").read_bytes()

    def full(self, folder):
        Path(folder, "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bm25s.BM25, "save", full)
    with pytest.raises(ValueError, match=r"bm25' cannot be written \(No space left on device\)"):
        bm25.build_index(Shards(own_folder))
    assert (own_folder / "bm25" / "index.json").read_bytes() == before
    assert not list(own_folder.glob(".unfinished*"))


def test_a_full_disk_while_faiss_writes(own_folder, monkeypatch):
    """The kernel's own full disk: every write to /dev/full fails."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(faiss_index, "_FILE", "/dev/full")
    with pytest.raises(StorageError, match=r"faiss' cannot be written \(No space left on device\); free space"):
        faiss_index.build_index(Shards(own_folder))
    assert not list(own_folder.glob(".unfinished*"))
    assert not (own_folder / "faiss").exists()


def test_an_index_of_faiss_without_faiss(own_folder, monkeypatch):
    pytest.importorskip("faiss")
    faiss_index.build_index(Shards(own_folder))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"FAISS is not installed: .*ullme search --exact"):
        Searcher(own_folder, StubEmbedder(), device="cpu").search([TEXT(2)], 1)
    exact = Searcher(own_folder, StubEmbedder(), device="cpu", exact=True)
    assert ids(exact.search([TEXT(2)], 1)[0]) == ["d2"]


def test_without_faiss_exact_search_works(own_folder, monkeypatch):
    inner = builtins.__import__

    def without(name, *rest, **options):
        if name in ("faiss", "bm25s"):
            raise ImportError(name)
        return inner(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    shards = Shards(own_folder)
    with pytest.raises(ValueError, match=r"FAISS is not installed: pip install 'ullme\[search\]'"):
        faiss_index.build_index(shards)
    with pytest.raises(ValueError, match=r"bm25s is not installed: pip install 'ullme\[search\]'"):
        bm25.build_index(shards)
    assert ids(Searcher(own_folder, StubEmbedder(), device="cpu").search([TEXT(2)], 1)[0]) == ["d2"]


def test_a_model_that_is_no_longer_at_its_place_is_named(tmp_path):
    folder = encoded(tmp_path / "e")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["name"] = str(tmp_path / "moved")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"was encoded by '.*moved', and there is no '.*moved' now; say where .* --model"
    ):
        Searcher(folder, device="cpu").search(["text"])
