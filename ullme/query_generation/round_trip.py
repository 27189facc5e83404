"""Keep the written queries that lead back to their document, and each query once.

A query is round-trip consistent (arXiv 2209.11755, section 3.2) where its own document is among the first k for it: by
BM25, or by the LLM's likelihood of the query after each document (arXiv 2204.07496), which BM25 chose.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from ullme.query_generation.writer import WrittenQuery
from ullme.search import bm25
from ullme.search.corpus import Corpus
from ullme.utils import atomic_files

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

RoundTrip = Literal["bm25", "likelihood", "none"]


@dataclass(frozen=True)
class RoundTripSettings:
    """Which queries are kept.

    Args:
        by: ``bm25``, ``likelihood`` or ``none``, which keeps all.
        k: the own document is among the first k.
        candidates: with ``likelihood``: the documents that BM25 finds, against which the own document is compared.
        stopwords: language of the words that BM25 leaves out, or none.
        max_length: with ``likelihood``: tokens of a document.
    """

    by: RoundTrip = "bm25"
    k: int = 10
    candidates: int = 10
    stopwords: str = "en"
    max_length: int = 256

    def check(self) -> None:
        """Raises: ValueError: a value out of range."""
        if self.by not in get_args(RoundTrip):
            raise ValueError(f"--round_trip {self.by}: choose {', '.join(get_args(RoundTrip))}")
        for name in ("k", "candidates", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.by == "likelihood" and self.k > self.candidates:
            raise ValueError(
                f"--k {self.k} of --candidates {self.candidates} keeps every query; give a smaller k or more candidates"
            )


@dataclass
class Texts:
    """A corpus in memory, with a BM25 index of it.

    Args:
        ids: of the n documents.
        texts: theirs.
        stopwords: language of the words that BM25 leaves out, or none.

    Raises:
        ValueError: bm25s is not installed, or no document has a word.
    """

    ids: list[str]
    texts: list[str]
    stopwords: str = "en"
    places: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {key: place for place, key in enumerate(self.ids)}
        self._retriever = bm25.fitted(self.texts, self.stopwords)

    @classmethod
    def of(cls, corpus: Corpus, stopwords: str) -> Texts:
        """All documents of a corpus."""
        documents = [document for _, document in corpus.documents()]
        return cls([document.id for document in documents], [document.text for document in documents], stopwords)

    def scores(self, query: str) -> np.ndarray:
        """(n,) BM25 scores; zero for a document that shares no word with the query."""
        (words,) = bm25.tokenized([query], self.stopwords)
        return self._retriever.get_scores(words) if words else np.zeros(len(self.ids), dtype=np.float32)


class Ranker(Protocol):
    """Ranks a query's own document among others."""

    def ranks(self, queries: Sequence[WrittenQuery]) -> list[int | None]:
        """The rank of each query's document, from 1; None where it is not found."""
        ...


class BM25Ranker:
    """By BM25 over the corpus; equal documents have one rank."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def ranks(self, queries: Sequence[WrittenQuery]) -> list[int | None]:
        return [self._rank(query) for query in queries]

    def _rank(self, query: WrittenQuery) -> int | None:
        scores = self.texts.scores(query.text)
        own = scores[self.texts.places[query.document]]
        return int((scores > own).sum()) + 1 if own > 0 else None


class LikelihoodRanker:
    """By mean log π(query | document), among the documents that BM25 finds and the query's own.

    Args:
        texts: of the corpus.
        model: whose LLM scores, its adapter switched off.
        settings: how many candidates, and how long they are.
    """

    def __init__(self, texts: Texts, model: ULLME, settings: RoundTripSettings) -> None:
        self.texts, self.model, self.settings = texts, model, settings

    def ranks(self, queries: Sequence[WrittenQuery]) -> list[int | None]:
        from ullme.models.query_likelihood import mean_query_logps

        candidates = [self._candidates(query) for query in queries]
        pairs = [(q.text, self.texts.texts[n]) for q, rows in zip(queries, candidates, strict=True) for n in rows]
        logps = mean_query_logps(self.model, pairs, passage_max_length=self.settings.max_length)
        ends = np.cumsum([len(rows) for rows in candidates])
        return [int((own[1:] > own[0]).sum()) + 1 for own in np.split(logps, ends[:-1])]

    def _candidates(self, query: WrittenQuery) -> list[int]:
        """The own document, and then those that BM25 finds beside it and that are no copy of it."""
        scores, own = self.texts.scores(query.text), self.texts.places[query.document]
        best = bm25.best_rows(scores, self.settings.candidates + 1)
        others = [n for n in best.tolist() if self.texts.texts[n] != self.texts.texts[own]]
        return [own, *others[: self.settings.candidates - 1]]


def rank_parts(
    parts: Iterable[list[WrittenQuery]], folder: Path, settings: RoundTripSettings, ranker: Ranker | None, done: Any
) -> Iterator[tuple[list[WrittenQuery], list[int | None]]]:
    """Each part with its ranks, which are kept on the disk: a command that was stopped computes those that are missing.

    Args:
        parts: the written queries.
        folder: with the parts.
        settings: which ranks.
        ranker: that computes them; None where none is wanted, and every rank is 1.
        done: called with the number of queries after each part.
    """
    known = json.dumps([settings.by, settings.candidates, settings.stopwords, settings.max_length])
    digest = hashlib.sha256(known.encode()).hexdigest()[:8]
    for number, queries in enumerate(parts):
        path = folder / f"ranks-{digest}-{number:05d}.json"
        if ranker is None:
            ranks: list[int | None] = [1] * len(queries)
        elif path.exists():
            ranks = json.loads(path.read_text(encoding="utf-8"))
        else:
            there = [query for query in queries if query.text]
            found = dict(zip(there, ranker.ranks(there), strict=True)) if there else {}
            ranks = [found.get(query) for query in queries]
            atomic_files.write_text(path, json.dumps(ranks), "--to")
        done(len(queries))
        yield queries, ranks


class Kept:
    """Queries that are kept, and how many were not, and why.

    Args:
        k: of the round trip.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.counts: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    def filter(self, queries: Iterable[WrittenQuery], ranks: Iterable[int | None]) -> Iterator[WrittenQuery]:
        """Those with a text, whose rank is at most k, and which no query before says with the same words."""
        for query, rank in zip(queries, ranks, strict=True):
            reason = self._reason(query, rank)
            self.counts[reason] += 1
            if reason == "kept":
                yield query

    def reasons(self, by: str) -> str:
        """Why queries were left out, in words; empty if none was.

        Args:
            by: of the round trip.
        """
        says = {
            "empty": "are empty",
            "inconsistent": f"do not find their document among the first {self.k} by {by}",
            "repeated": "say what one before says",
        }
        return ", ".join(f"{self.counts[key]} {text}" for key, text in says.items() if self.counts[key])

    def _reason(self, query: WrittenQuery, rank: int | None) -> str:
        if not query.text:
            return "empty"
        if rank is None or rank > self.k:
            return "inconsistent"
        digest = hashlib.blake2b(_normalised(query.text).encode(), digest_size=16).digest()
        if digest in self._seen:
            return "repeated"
        self._seen.add(digest)
        return "kept"


def _normalised(text: str) -> str:
    """A text in lower case, without punctuation at its end and without double spaces."""
    return " ".join(text.casefold().split()).rstrip(" ?!.")
