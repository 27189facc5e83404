"""Hashes of the texts of a corpus on disk: which document a text is, and which documents are copies of each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ullme.search.shards import Shards
from ullme.utils import atomic_files
from ullme.utils.progress import progress

# Documents whose hashes are held in memory at a time.
BLOCK = 1 << 18


def text_hash(text: str) -> int:
    """64 bits that are equal for texts that differ in white space and case alone."""
    normalised = " ".join(text.split()).casefold()
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "little")


def hashes_of(texts: Iterable[str]) -> np.ndarray:
    """(n,) uint64 :func:`text_hash` of each text."""
    return np.fromiter(map(text_hash, texts), dtype=np.uint64)


class TextHashes:
    """The hashes of all documents of a folder of embeddings, mapped into memory from a file of 8 bytes a document.

    Args:
        shards: the documents.
        path: of the file; it is written if it is not there.

    Raises:
        StorageError: it cannot be written.
    """

    def __init__(self, shards: Shards, path: Path) -> None:
        if not path.exists() or path.stat().st_size != 8 * len(shards):
            _write(shards, path)
        self._hashes = np.memmap(path, dtype=np.uint64, mode="r").view(np.ndarray)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The hashes of rows."""
        return self._hashes[rows]

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) int64 the first document that is each text; -1 where none is."""
        return self.find_hashes(hashes_of(texts))

    def find_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """As :meth:`find`, of (n,) uint64 hashes."""
        wanted, inverse = np.unique(hashes, return_inverse=True)
        rows = np.full(len(wanted), -1, dtype=np.int64)
        if len(wanted):
            for low in range(0, len(self._hashes), BLOCK):
                block = self._hashes[low : low + BLOCK]
                place = np.minimum(np.searchsorted(wanted, block), len(wanted) - 1)
                (hits,) = np.nonzero(wanted[place] == block)
                for hit in hits[rows[place[hits]] < 0].tolist():
                    if rows[place[hit]] < 0:
                        rows[place[hit]] = low + hit
        return rows[inverse]


def _write(shards: Shards, path: Path) -> None:
    def write(file: object) -> None:
        documents = progress("hashing texts", shards.all_documents(), total=len(shards), unit="document")
        for document in documents:
            file.write(text_hash(document.text).to_bytes(8, "little"))  # type: ignore[attr-defined]

    atomic_files.write_atomically(path, write, "--to")
