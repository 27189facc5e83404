"""A BM25 index (bm25s) over the documents of the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ullme.search import index_files
from ullme.search.shards import Shards
from ullme.search.words import WORDS, words

FOLDER = "bm25"
# The regular expression of a token in indexes that were built before index.json had it.
_OLD_TOKENS = r"(?u)\b\w\w+\b"


class BM25Index:
    """An open index, mapped into memory.

    Args:
        shards: that it is of.
        description: what index.json says.

    Attributes:
        stopwords: language of the words that are left out, or none.
        tokens: regular expression of a token.
    """

    def __init__(self, shards: Shards, description: dict[str, Any]) -> None:
        self._retriever = import_bm25s().BM25.load(str(shards.folder / FOLDER), mmap=True)
        self.stopwords: str = description["stopwords"]
        self.tokens: str = description.get("tokens", _OLD_TOKENS)
        self._documents = len(shards)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k documents of the largest BM25 score for each query.

        Returns:
            (Q, k) float32 scores and (Q, k) int64 rows; -inf and -1 where fewer documents share a word with the query.
        """
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        depth = min(k, self._documents)
        for number, own in enumerate(self.all_scores(queries)):
            best = best_rows(own, depth)
            scores[number, : len(best)], rows[number, : len(best)] = own[best], best
        return scores, rows

    def all_scores(self, queries: Sequence[str]) -> Iterator[np.ndarray]:
        """For each query the (n,) float32 scores of all documents; zero where no word is shared."""
        for own in tokenized(queries, self.stopwords, self.tokens):
            yield self._retriever.get_scores(own) if own else np.zeros(self._documents, dtype=np.float32)


def best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """The rows of the k largest positive scores, the smaller row first where scores are equal."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        least = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores[rows] >= least]
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


def open_index(shards: Shards) -> BM25Index:
    """The index beside the shards.

    Raises:
        ValueError: there is none, it is damaged, of other shards, or bm25s is not installed.
    """
    description = index_files.read_description(shards, FOLDER)
    if description is None:
        raise ValueError(f"{shards.folder} has no BM25 index; build it with `ullme index {shards.folder} --bm25`")
    return BM25Index(shards, description)


def build_index(shards: Shards, stopwords: str = "en") -> BM25Index:
    """Build an index of all documents, with bm25s's defaults (Lucene's variant, k1 1.5, b 0.75), and write it.

    The tokens of the corpus are held in memory.

    Args:
        shards: with the documents.
        stopwords: language of the words to leave out, such as en, de or fr, or "none".

    Raises:
        ValueError: bm25s is not installed, or has no stop words of the language.
    """
    retriever = fitted([document.text for document in shards.all_documents()], stopwords)

    def write(folder: Path) -> dict[str, Any]:
        retriever.save(str(folder))
        return {"stopwords": stopwords, "tokens": WORDS, "bm25s": import_bm25s().__version__}

    index_files.write_index(shards, FOLDER, write)
    return open_index(shards)


def fitted(texts: Sequence[str], stopwords: str) -> Any:
    """A ``bm25s.BM25`` of n texts, in memory: the same texts give the same, byte for byte.

    Raises:
        ValueError: bm25s is not installed, has no stop words of the language, or no text has a word.
    """
    # numbered as they come; of words alone bm25s numbers a set of them, whose order differs between processes
    found = _tokenize(texts, stopwords, WORDS, return_ids=True)
    if not found.vocab:
        raise ValueError("no document has a word of at least two letters, so BM25 finds none")
    retriever = import_bm25s().BM25()
    retriever.index(found, show_progress=False)
    return retriever


def tokenized(texts: Sequence[str], stopwords: str, tokens: str = WORDS) -> list[list[str]]:
    """The :func:`~ullme.search.words.words` of each text, in lower case, without stop words.

    Raises:
        ValueError: bm25s has no stop words of the language.
    """
    return _tokenize(texts, stopwords, tokens, return_ids=False)


def _tokenize(texts: Sequence[str], stopwords: str, tokens: str, return_ids: bool) -> Any:
    try:
        return import_bm25s().tokenize(
            [" ".join(found) for found in words(list(texts), tokens)],
            token_pattern=r"\S+",
            stopwords=None if stopwords == "none" else stopwords,
            return_ids=return_ids,
            show_progress=False,
        )
    except ValueError as error:
        raise ValueError(f"--stopwords {stopwords}: {error}; give a language such as en, or none") from None


def import_bm25s() -> Any:
    """Raises: ValueError: it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise ValueError("bm25s is not installed: pip install 'ullme[search]'") from None
    return bm25s
