"""How well scores rank a query's positive among its candidates, and how well two rankings agree."""

from __future__ import annotations

import torch
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
    better = (~(others <= first)).sum(1).double()  # a score that is NaN ranks the positive last, not first
    equal = (others == first).sum(1).double()
    return (better == 0).double() / (1 + equal), 1 / (1 + better + equal / 2)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of each query's two rankings: Pearson's of the ranks, where equal scores share their mean.

    torchmetrics computes it one query at a time, and waits for a GPU several times in each.

    Args:
        first: (b, C) scores.
        second: (b, C) scores.

    Returns:
        (b,) from -1 to 1; 0 where all scores of a query are equal.
    """
    a, b = (_centred_ranks(scores) for scores in (first, second))
    product = a.square().sum(1) * b.square().sum(1)
    agreement = (a * b).sum(1) / torch.where(product > 0, product, 1.0).sqrt()
    return torch.where(product > 0, agreement, 0.0).float()


def _centred_ranks(scores: Tensor) -> Tensor:
    """(b, C) ranks less their mean: half the number of candidates with a lower score less that with a higher one."""
    difference = scores[:, :, None] - scores[:, None]
    return difference.sign().double().sum(2) / 2
