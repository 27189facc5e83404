"""Exact search: the k best of all documents for each query, streaming over blocks of vectors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ullme.engine.topk import RunningTopK

# Queries whose scores over one block are held at a time: 1,024 x 16,384 scores take 64 MiB, their keys twice as much.
QUERY_BLOCK = 1024


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
    wanted = torch.as_tensor(queries, dtype=torch.float32, device=device)
    best = RunningTopK(len(wanted), k, device)
    for first, vectors in blocks:
        block = torch.from_numpy(vectors).to(device)
        rows = torch.arange(first, first + len(block), device=device)
        for low in range(0, len(wanted), QUERY_BLOCK):
            best.add(wanted[low : low + QUERY_BLOCK] @ block.T, rows, low)
    scores, rows = best.result()
    return scores.cpu().numpy(), rows.cpu().numpy()
