"""The same negatives as sentence-transformers' ``mine_hard_negatives``, with the same model and settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from eval_helpers import save_sentence_transformer, write_jsonl

from ullme.mining.miner import mine
from ullme.mining.retrievers import DenseRetriever
from ullme.mining.rows import open_rows
from ullme.mining.settings import MiningSettings
from ullme.search.corpus import open_corpus
from ullme.search.embedder import TextEmbedder, load_text_embedder
from ullme.search.encode import encode_corpus
from ullme.search.searcher import Searcher

WORDS = ["cat", "dog", "car", "stars", "sea", "bread", "oven", "train", "station", "rain", "hills", "moon", "tree"]


def texts(number: int, length: int, seed: int) -> list[str]:
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, length)) for _ in range(number)]


CORPUS = texts(80, 5, 0)
QUERIES = [" ".join(text.split()[:4]) for text in CORPUS[:12]]
# The last queries have two positives, in rows of their own; the corpus holds a copy of one of them.
PAIRS = [*zip(QUERIES, CORPUS, strict=False), *zip(QUERIES[9:], CORPUS[40:], strict=False)]
COPIED = [*CORPUS, CORPUS[40]]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> TextEmbedder:
    pytest.importorskip("datasets")
    return load_text_embedder(str(save_sentence_transformer(tmp_path_factory.mktemp("peer"))), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedder) -> Path:
    place = tmp_path_factory.mktemp("peer-corpus")
    rows = [{"_id": n, "text": text} for n, text in enumerate(COPIED)]
    corpus = open_corpus(str(write_jsonl(place / "corpus.jsonl", rows)))
    encode_corpus(embedder, corpus, place / "e", shard_rows=32, model_name="peer")
    return place / "e"


SETTINGS = [
    {"relative_margin": 0.05},
    {"relative_margin": 0.01, "num_negatives": 20},
    {"absolute_margin": 0.02, "range_min": 2, "range_max": 40},
    {"range_min": 3},
    {"max_score": 0.96, "min_score": 0.92, "relative_margin": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_negatives_as_sentence_transformers(settings, embedder, folder, tmp_path):
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    settings = {"num_negatives": 8, **settings}
    pairs = Dataset.from_list([{"query": query, "positive": text} for query, text in PAIRS])
    mined = mine_hard_negatives(
        pairs, embedder.model, corpus=COPIED, output_format="triplet", output_scores=True, verbose=False, **settings
    )
    expected = {pair: {} for pair in PAIRS}
    for row in mined:
        positive, negative = row["scores"]
        expected[row["query"], row["positive"]][row["negative"]] = (negative, positive)
    rows = open_rows([str(write_jsonl(tmp_path / "r.jsonl", [{"query": q, "pos": [p]} for q, p in PAIRS]))])
    retriever = DenseRetriever(Searcher(folder, embedder, device="cpu"))
    mine(rows, retriever, tmp_path / "m.jsonl", MiningSettings(**settings), block_rows=4)
    found = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert len(found) == len(PAIRS)
    for row in found:
        own = expected[row["query"], row["pos"][0]]
        assert row["neg"] == sorted(own, key=lambda text: -own[text][0])
        assert row["neg_scores"] == pytest.approx([own[text][0] for text in row["neg"]], abs=1e-5)
        assert not own or row["pos_scores"] == pytest.approx([next(iter(own.values()))[1]], abs=1e-5)
    assert sum(len(row["neg"]) for row in found) > 20
    nearest = MiningSettings(settings["num_negatives"])  # the settings are of effect, or both would be the nearest
    mine(rows, retriever, tmp_path / "nearest.jsonl", nearest)
    assert found != [json.loads(line) for line in (tmp_path / "nearest.jsonl").read_text().splitlines()]
