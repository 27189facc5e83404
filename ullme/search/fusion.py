"""Reciprocal rank fusion of several rankings (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    number = len(rankings[0])
    scores = np.full((number, k), -np.inf, dtype=np.float32)
    rows = np.full((number, k), -1, dtype=np.int64)
    for query in range(number):
        sums: dict[int, float] = {}
        for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
            for rank, row in enumerate(ranking[query].tolist(), start=1):
                if row >= 0 and weight > 0:
                    sums[row] = sums.get(row, 0.0) + weight / (constant + rank)
        best = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:k]
        rows[query, : len(best)] = [row for row, _ in best]
        scores[query, : len(best)] = [score for _, score in best]
    return scores, rows
