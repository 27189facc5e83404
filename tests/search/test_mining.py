"""Mining negatives: which documents are taken, and that nothing of it depends on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from eval_helpers import write_jsonl
from search_helpers import StubEmbedder

from ullme.data.records import parse_record
from ullme.search.corpus import open_corpus
from ullme.search.encode import encode_corpus
from ullme.search.mining import mine
from ullme.search.mining_rows import LabelledRows, UnlabelledQueries, open_rows
from ullme.search.mining_settings import MiningSettings
from ullme.search.retrievers import DenseRetriever
from ullme.search.searcher import Searcher

DOCUMENTS = [f"passage {n} about thing {n % 7}" for n in range(40)]


def make_folder(place: Path, texts: list[str] = DOCUMENTS) -> Path:
    corpus = write_jsonl(place / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    encode_corpus(StubEmbedder(), open_corpus(str(corpus)), place / "e", shard_rows=16, model_name="stub")
    return place / "e"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("mining"))


def retriever(folder: Path) -> DenseRetriever:
    return DenseRetriever(Searcher(folder, StubEmbedder(), device="cpu", exact=True))


def rows_of(place: Path, rows: list[dict]) -> LabelledRows:
    return open_rows([str(write_jsonl(place / "rows.jsonl", rows))])


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def cosines(query: str) -> np.ndarray:
    """(40,) of a query with all documents."""
    embedder = StubEmbedder()
    return embedder.embed(DOCUMENTS, "passage", max_length=9) @ embedder.embed([query], "query", max_length=9)[0]


def test_candidates_for_queries_without_labels(folder, tmp_path):
    queries = {f"q{n}": f"question {n}" for n in range(5)}
    written = mine(
        UnlabelledQueries(queries, "q"), retriever(folder), tmp_path / "c.jsonl", MiningSettings(3), block_rows=2
    )
    assert (written.rows, written.negatives, written.fewer) == (5, 15, 0)
    for row, (key, text) in zip(read(tmp_path / "c.jsonl"), queries.items(), strict=True):
        best = np.argsort(-cosines(text))[:3]
        assert (row["_id"], row["query"], row["candidate_ids"]) == (key, text, [f"d{n}" for n in best])
        assert row["scores"] == pytest.approx(cosines(text)[best].tolist(), abs=1e-6)
        record = parse_record(row)
        assert record.negatives == tuple(DOCUMENTS[n] for n in best)
        assert record.columns["score"] == tuple(row["scores"])
