"""A folder of embeddings of the stub, and rows to mine for, which the tests of mining share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from eval_helpers import write_jsonl
from search_helpers import StubEmbedder

from ullme.mining.retrievers import DenseRetriever
from ullme.mining.rows import LabelledRows, open_rows
from ullme.search.corpus import open_corpus
from ullme.search.encode import encode_corpus
from ullme.search.searcher import Searcher

DOCUMENTS = [f"passage {n} about thing {n % 7}" for n in range(40)]


def make_folder(place: Path, texts: list[str] = DOCUMENTS) -> Path:
    """Of documents d0, d1 ..."""
    corpus = write_jsonl(place / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    encode_corpus(StubEmbedder(), open_corpus(str(corpus)), place / "e", shard_rows=16, model_name="stub")
    return place / "e"


def dense(folder: Path, embedder: StubEmbedder | None = None) -> DenseRetriever:
    return DenseRetriever(Searcher(folder, embedder or StubEmbedder(), device="cpu", exact=True))


def rows_of(place: Path, rows: list[dict]) -> LabelledRows:
    return open_rows([str(write_jsonl(place / "rows.jsonl", rows))])


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def cosines(query: str, texts: list[str] = DOCUMENTS) -> np.ndarray:
    """(n,) of a query with texts."""
    embedder = StubEmbedder()
    return embedder.embed(texts, "passage", max_length=9) @ embedder.embed([query], "query", max_length=9)[0]
