"""Exact search: the k best of all documents for each query, streaming over blocks of vectors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

# Queries whose scores over one block are held at a time: 1,024 x 16,384 scores take 64 MiB, their keys twice as much.
QUERY_BLOCK = 1024
_ROW_BITS = 32


def exact_top_k(
    queries: np.ndarray | Tensor,
    blocks: Iterable[tuple[int, np.ndarray]],
    k: int,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents with the largest inner products, for each query.

    Memory beside one block and the results does not depend on the numbers of queries and documents. Documents with
    equal scores come in the order of their rows, so the result does not depend on how the corpus is divided.

    Args:
        queries: (Q, D) float32.
        blocks: (number of the first row, (n, D) float32 vectors), such as ``Shards.blocks()``.
        k: how many.
        device: that multiplies.

    Returns:
        (Q, k) float32 scores in decreasing order and (Q, k) int64 rows. Where there are fewer than k documents: -inf
        and -1.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    wanted = torch.as_tensor(queries, dtype=torch.float32, device=device)
    best = torch.full((len(wanted), k), torch.iinfo(torch.int64).min, device=device)
    for first, vectors in blocks:
        block = torch.from_numpy(vectors).to(device)
        rows = torch.arange(first, first + len(block), device=device)
        for low in range(0, len(wanted), QUERY_BLOCK):
            part = slice(low, low + QUERY_BLOCK)
            keys = _keys(wanted[part] @ block.T, rows)
            keys = keys.topk(min(k, len(block)), dim=1).values
            best[part] = torch.cat([best[part], keys], dim=1).topk(k, dim=1).values
    scores, rows = _decoded(best)
    return scores.cpu().numpy(), rows.cpu().numpy()


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """(Q, n) int64 keys, all different, in the order of the scores; the smaller row first where scores are equal.

    The upper half is the score's bits as an integer of the same order (of a negative float the other 31 bits count
    downwards), the lower half counts rows downwards.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << _ROW_BITS) | (0xFFFFFFFF - rows)


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and rows of keys; -inf and -1 for the smallest integer, which stands for no document."""
    ordered = (keys >> _ROW_BITS).int()
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    rows = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    nothing = keys == torch.iinfo(torch.int64).min
    return scores.masked_fill(nothing, -torch.inf), rows.masked_fill(nothing, -1)
