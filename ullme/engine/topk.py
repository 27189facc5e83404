"""The k best documents of each query, kept while documents arrive in any order, on one rank or on several."""

from __future__ import annotations

import torch
from torch import Tensor

from ullme.distributed import gather, world

_ROW_BITS = 32
_NOTHING = torch.iinfo(torch.int64).min


class RunningTopK:
    """The k largest scores of each query among the documents seen so far.

    Documents with equal scores come in the order of their rows, so the result depends neither on the order in which
    documents arrive nor on how they are divided over blocks and ranks. Nothing here waits for a GPU.

    Args:
        queries: Q.
        k: how many documents to keep for each query.
        device: of the scores.

    Raises:
        ValueError: ``k`` is below 1.
    """

    def __init__(self, queries: int, k: int, device: str | torch.device = "cpu") -> None:
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        self._best = torch.full((queries, k), _NOTHING, device=device)

    def add(self, scores: Tensor, rows: Tensor, first_query: int = 0) -> None:
        """Compare documents with those kept.

        Args:
            scores: (q, n) float32, of the queries from ``first_query`` on; -inf stands for a document that is not
                ranked for a query.
            rows: (n,) int64, the documents' numbers, from 0 to 2^32 - 1.
            first_query: the first of these queries.
        """
        best = self._best[first_query : first_query + len(scores)]
        k = best.shape[1]
        keys = _keys(scores, rows)
        if keys.shape[1] > k:  # first the few of the block, so that all the rest is not copied
            keys = keys.topk(k, dim=1).values
        best.copy_(torch.cat([best, keys], dim=1).topk(k, dim=1).values)

    def merge_ranks(self, own: Tensor) -> None:
        """Make this the k best of all ranks' documents, the same on every rank. Without gradient.

        Args:
            own: (P,) bool, the documents that count on this rank. One that several ranks have seen must count on one
                of them only, or it would take two places.
        """
        if (ranks := world()[1]) == 1:
            return
        rows = _rows(self._best)
        mine = torch.where((rows >= 0) & own[rows.clip(0)], self._best, _NOTHING)
        every = gather(mine[None], [1] * ranks)  # (W, Q, k)
        self._best = every.transpose(0, 1).flatten(1).topk(self._best.shape[1], dim=1).values

    def result(self) -> tuple[Tensor, Tensor]:
        """(Q, k) float32 scores in decreasing order and (Q, k) int64 rows; -inf and -1 where there are fewer."""
        return _scores(self._best), _rows(self._best)


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """(Q, n) int64 keys, all different, in the order of the scores; the smaller row first where scores are equal.

    The upper half is the score's bits as an integer of the same order (of a negative float the other 31 bits count
    downwards), the lower half counts rows downwards. A document with the score -inf is no document.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return ((ordered << _ROW_BITS) | (0xFFFFFFFF - rows)).masked_fill(torch.isneginf(scores), _NOTHING)


def _scores(keys: Tensor) -> Tensor:
    """The scores of keys; -inf for the smallest integer, which stands for no document."""
    ordered = (keys >> _ROW_BITS).int()
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return scores.masked_fill(keys == _NOTHING, -torch.inf)


def _rows(keys: Tensor) -> Tensor:
    """The rows of keys; -1 for no document."""
    return (0xFFFFFFFF - (keys & 0xFFFFFFFF)).masked_fill(keys == _NOTHING, -1)
