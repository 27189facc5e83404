"""The corpus that negatives are mined from, where it is not a folder of `ullme encode` yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ullme.data.sources import RowSource
from ullme.mining.text_hashes import text_hash
from ullme.prompts import Role
from ullme.search import bm25, index_files
from ullme.search.corpus import Corpus
from ullme.search.embedder import OnBatch
from ullme.search.encode import encode_corpus
from ullme.search.shards import Shards
from ullme.utils import atomic_files
from ullme.utils.progress import progress


class NoVectors:
    """A :class:`~ullme.search.embedder.TextEmbedder` of zero dimensions, for a folder that only BM25 searches."""

    kind, similarity, dimensions, default_max_length = "none", "none", 0, 1

    def __init__(self) -> None:
        self.prompts: dict[str, Any] = {}

    def revision(self) -> str:
        return "none"

    def embed(self, texts: Sequence[str], role: Role, *, on_batch: OnBatch | None = None, **_: Any) -> np.ndarray:
        if on_batch is not None:
            on_batch(len(texts))
        return np.empty((len(texts), 0), dtype=np.float32)


def bm25_folder(corpus: Corpus, folder: Path, stopwords: str) -> Shards:
    """The texts of a corpus and a BM25 index of them; what is there of an earlier call is kept.

    Raises:
        ValueError: a bad document, the folder is of another corpus, or bm25s is not installed.
    """
    bm25.import_bm25s()
    encode_corpus(NoVectors(), corpus, folder)
    shards = Shards(folder)
    description = index_files.read_description(shards, bm25.FOLDER)
    if description is None or (description["stopwords"], description.get("tokens")) != (stopwords, bm25.WORDS):
        bm25.build_index(shards, stopwords)
    return shards


def write_passages(source: RowSource, path: Path) -> None:
    """Write the passages of training rows as a corpus: each text once, numbered from 0. 8 bytes a text are held.

    Raises:
        StorageError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        for number, text in enumerate(_different(source)):
            file.write(json.dumps({"_id": str(number), "text": text}, ensure_ascii=False).encode() + b"\n")

    atomic_files.write_atomically(path, write, "--to")


def _different(source: RowSource) -> Iterator[str]:
    seen: set[int] = set()
    for number in progress("reading passages", range(len(source)), unit="row"):
        record = source[number]
        for text in (*record.positives, *record.negatives):
            if (key := text_hash(text)) not in seen:
                seen.add(key)
                yield text
