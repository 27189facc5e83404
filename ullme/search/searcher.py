"""Search a folder of embeddings: dense, BM25, or both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ullme.search import bm25, faiss_index, fusion_weight
from ullme.search.embedder import TextEmbedder, check_instruction, load_text_embedder
from ullme.search.fusion import DEPTH, Fusion, Ranking, check_fusion, fuse
from ullme.search.queries import Hit
from ullme.search.shards import Shards
from ullme.search.topk import exact_top_k

Method = Literal["dense", "bm25", "fused"]


class Searcher:
    """Searches the documents of a folder of ``ullme encode``.

    Example::

        searcher = Searcher("embeddings")
        for hit in searcher.search(["how long does a flea live"], k=10)[0]:
            print(hit.score, hit.id, hit.text[:80])

    Args:
        folder: of embeddings.
        embedder: of the queries; None loads the model that the manifest names, at the first dense search.
        device: of the model and of exact search; None takes a GPU if there is one.
        model: name or folder of the model, where it is no longer where it was.
        instruction: of the queries; None takes the prompt contract's.
        max_length: of a query in tokens, template included; None is 512, or a sentence-transformers model's own.
        exact: search the shards themselves, even where there is a FAISS index.
        dense_weight: of dense search in fusion, from 0 to 1; BM25 has the rest. None takes what was chosen on judged
            queries for the folder (:mod:`ullme.search.fusion_weight`), or 0.5. A model that ranks worse than BM25
            should have less than half, or it takes away more than it adds.
        fusion: by ``scores`` (:func:`~ullme.search.fusion.convex_combination`) or by ranks (``rrf``,
            :func:`~ullme.search.fusion.reciprocal_rank_fusion`).

    Raises:
        ValueError: no such folder, shards that are missing or truncated, an index of other shards, a weight out of
            range, or an unknown fusion.
    """

    def __init__(
        self,
        folder: str | Path,
        embedder: TextEmbedder | None = None,
        *,
        device: str | None = None,
        model: str | None = None,
        instruction: str | None = None,
        max_length: int | None = None,
        exact: bool = False,
        dense_weight: float | None = None,
        fusion: Fusion = "scores",
    ) -> None:
        check_dense_weight(dense_weight)
        check_fusion(fusion)
        self.shards = Shards(folder)
        self._dense_weight, self.fusion = dense_weight, fusion
        self.instruction, self.max_length = instruction, max_length
        self._device, self._model = device, model
        self._given = embedder
        self._exact = exact

    @cached_property
    def index(self) -> faiss_index.FaissIndex | None:
        """The FAISS index; None without one, or with ``exact``. Raises: ValueError: it is of other shards."""
        return None if self._exact else faiss_index.open_index(self.shards)

    @cached_property
    def embedder(self) -> TextEmbedder:
        """The model of the folder. Raises: ValueError: it cannot be loaded, or has changed."""
        stored = self.shards.manifest["model"]
        name = self._model or stored["name"]
        if self._given is None and Path(name).is_absolute() and not Path(name).exists():
            raise ValueError(
                f"{self.shards.folder} was encoded by {stored['name']!r}, and there is no {name!r} now; say where the "
                "model is with --model, or encode again"
            )
        embedder = self._given or load_text_embedder(name, device=self._device, **stored["options"])
        check_instruction(embedder.prompts, "query", self.instruction)
        if (revision := embedder.revision()) != stored["revision"]:
            raise ValueError(
                f"{self.shards.folder} was encoded by {stored['name']!r}, revision {stored['revision']}, and "
                f"{name!r} has revision {revision} now; name the same model with --model, or encode again"
            )
        return embedder

    @cached_property
    def device(self) -> str:
        """The device of exact search."""
        from ullme.models.checkpoint import usable_device

        return usable_device(self._device)

    def embed(self, queries: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """(Q, D) float32 embeddings of queries, as the folder's are.

        Args:
            queries: Q texts.
            instruction: theirs; None takes the searcher's.
        """
        return self.embedder.embed(
            queries,
            "query",
            instruction=instruction or self.instruction,
            max_length=self.max_length or self.embedder.default_max_length,
            truncate_dim=self.shards.manifest["truncate_dim"],
        )

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D) float32 embeddings of texts, as documents of the folder were embedded, before they were quantised."""
        manifest = self.shards.manifest
        return self.embedder.embed(
            texts,
            manifest["role"],
            instruction=manifest["instruction"],
            max_length=manifest["max_length"],
            truncate_dim=manifest["truncate_dim"],
        )

    def dense(self, queries: Sequence[str] | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest documents of each query, through the index if there is one.

        Args:
            queries: Q texts, or their (Q, D) embeddings.
            k: how many.

        Returns:
            (Q, k) float32 scores, inner products, and (Q, k) int64 rows; -inf and -1 where there are fewer.
        """
        vectors = queries if isinstance(queries, np.ndarray) else self.embed(queries)
        if self.index is not None:
            return self.index.search(vectors, k)
        return exact_top_k(vectors, self.shards.blocks(), k, self.device)

    @cached_property
    def _bm25(self) -> bm25.BM25Index:
        return bm25.open_index(self.shards)

    def bm25(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`dense`, by BM25; documents that share no word with a query are not found.

        Raises:
            ValueError: there is no BM25 index, or it is of other shards.
        """
        return self._bm25.search(queries, k)

    @cached_property
    def dense_weight(self) -> float:
        """Of dense search in fusion. Raises: ValueError: the folder's was chosen for other shards."""
        if self._dense_weight is not None:
            return self._dense_weight
        chosen = fusion_weight.read_weight(self.shards, self.fusion)
        return fusion_weight.DEFAULT if chosen is None else chosen

    def rankings(self, queries: Sequence[str], k: int = 0) -> tuple[Ranking, Ranking]:
        """The scores and rows of dense search and of BM25 that fusion looks at for the k best documents."""
        depth = max(k, DEPTH)
        words = self.bm25(queries, depth)  # first: it takes no model to find that there is no index
        return self.dense(queries, depth), words

    def fused(self, queries: Sequence[str], k: int) -> Ranking:
        """As :meth:`dense`, by fusion of dense search and BM25."""
        weight = self.dense_weight  # before anything is computed
        return fuse(*self.rankings(queries, k), k, weight, self.fusion)

    def search(self, queries: Sequence[str], k: int = 10, method: Method = "dense") -> list[list[Hit]]:
        """The k best documents of each query, the best first.

        Raises:
            ValueError: ``k`` below 1, an unknown method, or no BM25 index.
        """
        check_method(method)
        if k < 1:
            raise ValueError(f"--k {k} must be at least 1")
        scores, rows = {"dense": self.dense, "bm25": self.bm25, "fused": self.fused}[method](queries, k)
        return self.hits(scores, rows)

    def hits(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        """The documents of (Q, k) scores and rows."""
        there = rows >= 0
        documents = self.shards.documents(rows[there])
        found = [Hit(float(s), d.id, d.text) for s, d in zip(scores[there].tolist(), documents, strict=True)]
        ends = np.cumsum(there.sum(axis=1)).tolist()
        return [found[low:high] for low, high in zip([0, *ends], ends, strict=False)]


def check_dense_weight(weight: float | None) -> None:
    """Raises: ValueError: it is no share."""
    if weight is not None and not 0 <= weight <= 1:
        raise ValueError(f"--dense_weight {weight} must be from 0 (BM25 alone) to 1 (dense search alone)")


def check_method(method: str) -> None:
    """Raises: ValueError: it is none."""
    if method not in get_args(Method):
        raise ValueError(f"--method {method}: choose {', '.join(get_args(Method))}")
