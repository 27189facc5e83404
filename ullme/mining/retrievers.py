"""Find documents for a block of queries, with the scores of the positives that are known: dense and exact, or BM25."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ullme.search import bm25
from ullme.search.searcher import Searcher
from ullme.search.shards import Shards
from ullme.search.topk import exact_top_k


class Question(NamedTuple):
    """A query, and what is known to answer it.

    Args:
        query: its text.
        positives: texts.
        rows: the document that each positive is; -1 for none.
        instruction: the query's own; None for the model's.
    """

    query: str
    positives: list[str]
    rows: list[int]
    instruction: str | None = None


class Found(NamedTuple):
    """What was found for Q queries.

    Args:
        scores: (Q, k) float32 in decreasing order.
        rows: (Q, k) int64 documents; -1 where fewer were found.
        positives: for each query the (n,) float32 scores of its positives; NaN where there is no saying.
    """

    scores: np.ndarray
    rows: np.ndarray
    positives: list[np.ndarray]


class Retriever(Protocol):
    """Finds documents.

    Attributes:
        name: dense or bm25.
        shards: the documents.
        scores_all: whether a positive that is no document has a score too.
    """

    name: str
    shards: Shards
    scores_all: bool

    def find(self, questions: Sequence[Question], k: int) -> Found:
        """The k best documents of each query."""
        ...

    def identity(self) -> dict[str, str]:
        """What the scores depend on, besides the documents: name -> value."""
        ...


class DenseRetriever:
    """Exact search by embeddings.

    A positive that is a document has the score of its stored vector; another one is embedded as the documents were.

    Args:
        searcher: of the folder.

    Attributes:
        takes_instructions: whether a query's own instruction is used; sentence-transformers models have prompts.
    """

    name, scores_all = "dense", True

    def __init__(self, searcher: Searcher) -> None:
        self.searcher, self.shards = searcher, searcher.shards
        self.takes_instructions = self.shards.manifest["model"]["kind"] != "sentence-transformers"

    def identity(self) -> dict[str, str]:
        stored = self.shards.manifest["model"]["revision"]
        return {"model": stored, **{n: str(getattr(self.searcher, n)) for n in ("instruction", "max_length")}}

    def find(self, questions: Sequence[Question], k: int) -> Found:
        vectors = self._queries(questions)
        scores, rows = exact_top_k(vectors, self.shards.blocks(), k, self.searcher.device)
        owner = [n for n, question in enumerate(questions) for _ in question.positives]
        positives = self._passages(questions)
        known = np.einsum("nd,nd->n", vectors[owner], positives) if owner else np.empty(0, dtype=np.float32)
        ends = np.cumsum([len(question.positives) for question in questions])
        return Found(scores, rows, np.split(known, ends[:-1]))

    def _queries(self, questions: Sequence[Question]) -> np.ndarray:
        """(Q, D)."""
        out = np.empty((len(questions), self.shards.dimensions), dtype=np.float32)
        instructions = [question.instruction if self.takes_instructions else None for question in questions]
        for instruction in dict.fromkeys(instructions):
            own = [n for n, other in enumerate(instructions) if other == instruction]
            out[own] = self.searcher.embed([questions[n].query for n in own], instruction)
        return out

    def _passages(self, questions: Sequence[Question]) -> np.ndarray:
        """(all positives, D)."""
        texts = [text for question in questions for text in question.positives]
        rows = np.array([row for question in questions for row in question.rows], dtype=np.int64)
        out = np.empty((len(texts), self.shards.dimensions), dtype=np.float32)
        out[rows >= 0] = self.shards.vectors(rows[rows >= 0])
        if outside := np.flatnonzero(rows < 0).tolist():
            out[outside] = self.searcher.embed_documents([texts[n] for n in outside])
        return out


class BM25Retriever:
    """BM25. A positive that is no document has no score, and a document without a word of the query is not found.

    Args:
        shards: with a BM25 index beside them.

    Raises:
        ValueError: there is none, or it is of other shards.
    """

    name, scores_all = "bm25", False

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.index = bm25.open_index(shards)

    def identity(self) -> dict[str, str]:
        return {"stopwords": self.index.stopwords}

    def find(self, questions: Sequence[Question], k: int) -> Found:
        scores = np.full((len(questions), k), -np.inf, dtype=np.float32)
        rows = np.full((len(questions), k), -1, dtype=np.int64)
        positives = []
        for n, own in enumerate(self.index.all_scores([question.query for question in questions])):
            best = bm25.best_rows(own, k)
            scores[n, : len(best)], rows[n, : len(best)] = own[best], best
            places = np.array(questions[n].rows, dtype=np.int64)
            positives.append(np.where(places >= 0, own[places], np.float32(np.nan)).astype(np.float32))
        return Found(scores, rows, positives)
