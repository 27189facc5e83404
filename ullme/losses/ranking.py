"""How well scores rank a query's positive among its candidates."""

from __future__ import annotations

from torch import Tensor


def rank_of_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and reciprocal rank of the first candidate, the positive.

    Equal scores stand in no order: of k candidates that share the best score the positive is first in one case of k,
    and its rank is the mean of those that they share.

    Args:
        scores: (b, C), the positive's first; higher is better.

    Returns:
        (b,) the chance that the positive comes first, and (b,) one over its rank.
    """
    others, first = scores[:, 1:], scores[:, :1]
    better, equal = (others > first).sum(1).double(), (others == first).sum(1).double()
    return (better == 0).double() / (1 + equal), 1 / (1 + better + equal / 2)
