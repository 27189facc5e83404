"""Fusion of dense search and BM25: by their scores (Bruch, Gai and Ingber, arXiv 2210.11934) or by their ranks
(reciprocal rank fusion; Cormack, Clarke and Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

Fusion = Literal["scores", "rrf"]

# Documents of each ranking that fusion looks at, where fewer are asked for.
DEPTH = 100

# (Q, k) scores in decreasing order and (Q, k) rows of documents, -inf and -1 where there are fewer.
Ranking = tuple[np.ndarray, np.ndarray]

# The constant of the paper.
RANK_CONSTANT = 60


def reciprocal_rank_fusion(
    rankings: Sequence[np.ndarray], k: int, constant: int = RANK_CONSTANT, weights: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rank documents by the sum over rankings of weight / (constant + rank), ranks from 1.

    Args:
        rankings: (Q, depth) int64 rows of documents in each, the best first; -1 stands for no document, at the end.
        k: how many to return.
        constant: the larger, the less the first ranks stand out.
        weights: of the rankings, not negative; None is 1 for each, as in the paper. A ranking of weight 0 is left out.

    Returns:
        (Q, k) float32 scores in decreasing order and (Q, k) int64 rows, the smaller row first where scores are equal;
        -inf and -1 where there are fewer than k.
    """
    given = zip(rankings, weights or [1.0] * len(rankings), strict=True)
    parts = [
        (np.broadcast_to(weight / (constant + 1 + np.arange(rows.shape[1])), rows.shape), rows, 0.0)
        for rows, weight in given
        if weight > 0
    ]
    return _best_sums(parts, k)


def convex_combination(dense: Ranking, words: Ranking, k: int, dense_weight: float) -> Ranking:
    """Rank documents by weight * dense score + (1 - weight) * BM25 score (arXiv 2210.11934), scaled per query.

    A ranking's best score becomes 1; 0 is the score at rank :data:`DEPTH` of dense search, and BM25's own 0. A document
    that one of them has not found gets 0, or the lowest scaled score that it has given if that is below. Scores keep
    what ranks lose: how far the best are ahead, so a ranking that hardly tells documents apart moves little.

    Args:
        dense: (Q, depth) scores and rows.
        words: likewise, of BM25.
        k: how many to return.
        dense_weight: from 0 (BM25 alone) to 1 (dense search alone).

    Returns:
        As :func:`reciprocal_rank_fusion`.
    """
    parts = []
    for (scores, rows), weight, zero in ((dense, dense_weight, None), (words, 1 - dense_weight, 0.0)):
        if weight > 0:
            scaled = weight * _scaled(scores, zero)
            parts.append((scaled, rows, np.where(rows >= 0, scaled, np.inf).min(axis=1, initial=0.0)))
    return _best_sums(parts, k)


def _scaled(scores: np.ndarray, zero: float | None) -> np.ndarray:
    """(Q, depth) scores with each row's best as 1, and ``zero``, or the last of the first :data:`DEPTH`, as 0."""
    found = np.isfinite(scores)
    top = np.where(found[:, :1], scores[:, :1], 0.0)
    low = np.where(found, scores, np.inf)[:, :DEPTH].min(axis=1, keepdims=True) if zero is None else np.float64(zero)
    span = np.where(top > low, top - low, 1.0)
    return np.where(found, np.where(top > low, (scores - low) / span, 1.0), 0.0)


def _best_sums(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | float]], k: int) -> Ranking:
    """The k documents of the largest sum over (Q, depth) values, rows, and (Q,) value of a document without one."""
    number = len(parts[0][1])
    scores = np.full((number, k), -np.inf, dtype=np.float32)
    rows = np.full((number, k), -1, dtype=np.int64)
    for query in range(number):
        floors = [float(np.broadcast_to(floor, number)[query]) for _, _, floor in parts]
        sums: dict[int, float] = {}
        for (values, found, _), floor in zip(parts, floors, strict=True):
            for row, value in zip(found[query].tolist(), values[query].tolist(), strict=True):
                if row >= 0:
                    sums[row] = sums.get(row, sum(floors)) + value - floor
        best = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:k]
        rows[query, : len(best)] = [row for row, _ in best]
        scores[query, : len(best)] = [score for _, score in best]
    return scores, rows


def fuse(dense: Ranking, words: Ranking, k: int, dense_weight: float, how: Fusion = "scores") -> Ranking:
    """The k best documents of dense search and BM25 together.

    Args:
        dense: (Q, depth) scores and rows.
        words: likewise, of BM25.
        k: how many to return.
        dense_weight: of dense search, from 0 to 1; BM25 has the rest.
        how: by :func:`convex_combination` or :func:`reciprocal_rank_fusion`.
    """
    if how == "scores":
        return convex_combination(dense, words, k, dense_weight)
    return reciprocal_rank_fusion([dense[1], words[1]], k, weights=[2 * dense_weight, 2 - 2 * dense_weight])


def check_fusion(how: str) -> None:
    """Raises: ValueError: there is no such fusion."""
    if how not in get_args(Fusion):
        raise ValueError(f"--fusion {how}: choose {', '.join(get_args(Fusion))}")
