"""Ranking the passages of validation while they are embedded: no rank ever holds the embeddings of the corpus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ullme.distributed import merge_unit_rows, world
from ullme.engine.topk import RunningTopK
from ullme.utils.transfer import to_device


class CorpusRanking:
    """The k nearest passages of each query by cosine, from batches of queries and then of passages.

    Each rank embeds its part of both. The queries' embeddings are then gathered, since they are few; of the passages a
    rank keeps its k best for each query, and only these are merged over ranks. The result does not depend on the
    number of ranks, equal cosines included. Memory: Q * (D floats + k int64), and P bits for which passages were seen.

    Args:
        queries: Q.
        passages: P.
        width: D.
        k: how many passages to keep for each query.
        device: of the embeddings.
        left_out: for each query, the index of its own copy among the passages, which is not ranked, or None.
    """

    def __init__(
        self,
        queries: int,
        passages: int,
        width: int,
        k: int,
        device: torch.device,
        left_out: Sequence[int | None] | None = None,
    ) -> None:
        copies = [-1 if copy is None else copy for copy in left_out or [None] * queries]
        (self._copies,) = to_device([np.array(copies, dtype=np.int64)], device)
        self._queries = torch.zeros(queries, width, device=device)
        self._queries_merged = False
        self._seen = torch.zeros(passages, dtype=torch.bool, device=device)
        self._best = RunningTopK(queries, k, device)

    def add_queries(self, embeddings: Tensor, indices: Tensor) -> None:
        """Keep (R, D) normalised embeddings of the queries of (R,) indices."""
        self._queries[indices] = embeddings.float()

    def add_passages(self, embeddings: Tensor, indices: Tensor) -> None:
        """Rank passages. All ranks must have added all their queries, and all must call this at least once.

        Args:
            embeddings: (R, D), normalised.
            indices: (R,) int64, of the passages.
        """
        if not self._queries_merged:
            self._queries, self._queries_merged = merge_unit_rows(self._queries), True
        with torch.autocast(embeddings.device.type, enabled=False):  # it would round the cosines to bfloat16
            cosines = self._queries @ embeddings.float().T
        is_copy = self._copies[:, None] == indices
        self._best.add(cosines.masked_fill(is_copy, -torch.inf), indices)
        self._seen.index_fill_(0, indices, True)

    def merge_ranks(self) -> bool:
        """Let every rank know the best passages of all ranks.

        Returns:
            Whether every query and every passage was embedded on some rank.
        """
        rank, ranks = world()
        owner = torch.where(self._seen, rank, ranks)
        if ranks > 1:  # two ranks may have embedded the same batch; it counts on the first of them
            dist.all_reduce(owner, dist.ReduceOp.MIN)
        self._best.merge_ranks(owner == rank)
        return bool(self._queries_merged and self._queries.any(dim=1).all() and (owner < ranks).all())

    def best(self) -> Tensor:
        """(Q, k) int64 indices of passages, the nearest first; -1 where there are fewer than k."""
        return self._best.result()[1]
