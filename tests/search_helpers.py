"""A model of no weights and a small corpus, which the tests of search share."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np

from ullme.search.corpus import Corpus, open_corpus
from ullme.search.encode import EncodeSettings, encode_corpus


class StubEmbedder:
    """A text's embedding is drawn with its hash as the seed; queries and passages have other ones."""

    kind, similarity, default_max_length = "stub", "cosine", 512

    def __init__(self, dimensions: int = 16, version: str = "1", prompts: dict | None = None) -> None:
        self.dimensions = dimensions
        self.version = version
        self.prompts = prompts or {"passage": "{text}"}
        self.embedded: list[int] = []  # the number of texts in each call

    def revision(self) -> str:
        return self.version

    def embed(self, texts, role, *, instruction=None, max_length, batch_size=None, truncate_dim=None, on_batch=None):
        self.embedded.append(len(texts))
        rows = [np.random.default_rng(int(hashlib.md5(text.encode()).hexdigest(), 16)) for text in texts]
        out = np.stack([row.standard_normal(self.dimensions) for row in rows]).astype(np.float32)[:, :truncate_dim]
        if on_batch is not None:
            on_batch(len(texts))
        return out / np.linalg.norm(out, axis=1, keepdims=True)


class SlowEmbedder(StubEmbedder):
    """Takes half a second a call, so that a process can be killed in the middle of its work."""

    def embed(self, texts, role, **options):
        time.sleep(0.5)
        return super().embed(texts, role, **options)


def load_slow() -> tuple[SlowEmbedder, dict]:
    """As Ray's actors load a model."""
    return SlowEmbedder(), {}


def write_corpus(path: Path, number: int = 10) -> Path:
    """``number`` documents of the ids d0, d1 ..., the words of which tell them apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"_id": f"d{n}", "title": f"title {n}", "text": f"text of document n{n}"} for n in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus_of(path: Path, number: int = 10, **options) -> Corpus:
    return open_corpus(str(write_corpus(path, number)), **options)


def encoded(folder: Path, number: int = 10, shard_rows: int = 4, settings: EncodeSettings | None = None) -> Path:
    """A folder of embeddings of the stub."""
    corpus = corpus_of(folder.parent / "corpus.jsonl", number)
    encode_corpus(StubEmbedder(), corpus, folder, settings, shard_rows=shard_rows, model_name="stub")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file, hidden ones included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
