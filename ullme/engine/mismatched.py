"""Pairs of a query with another query's positive, out of the global batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ullme.batch import GENERATION_FIELDS, Batch, GenerationRows, LikelihoodKind
from ullme.distributed import all_reduce_max, gather, world
from ullme.token_rows import HostMasks, TokenRows


def mismatched_pairs(batch: Batch, kinds: Iterable[LikelihoodKind]) -> Batch:
    """Each query with the positive of the next query of the global batch, the last with that of the first.

    Every rank has to call this, with the same kinds; the global batch is the ranks' batches one after another.

    Args:
        batch: B queries of this rank, with C candidates each.
        kinds: the likelihoods that the pairs carry rows for.

    Returns:
        The B queries with one candidate each.
    """
    fields: dict[str, Any] = dict.fromkeys(GENERATION_FIELDS.values())
    for kind in kinds:
        rows = batch.generation_rows(kind)
        if kind == "query_given_passage":
            pairs = GenerationRows(_of_next_query(rows.prompts, batch), rows.targets)
        else:
            pairs = GenerationRows(rows.prompts, _of_next_query(rows.targets, batch))
        fields[GENERATION_FIELDS[kind]] = pairs
    keys = _next_first(batch.passage_keys[:, :1])
    # numbers of other candidates say nothing about these pairs
    fields |= {"columns": {}, "extra_positives": None, "extra_positive_keys": None}
    return replace(batch, **fields, passages=_of_next_query(batch.passages, batch), passage_keys=keys)


def _of_next_query(rows: TokenRows, batch: Batch) -> TokenRows:
    """(B * C, L) rows of candidates to the (B, L') rows of the next query's positive, which is its first candidate."""
    first = rows[:: batch.num_candidates]
    width = all_reduce_max(first.input_ids.shape[1], first.input_ids.device)

    def shift(x: Tensor) -> Tensor:
        return _next_first(torch.nn.functional.pad(x, (0, width - x.shape[1])))

    host = first.host
    if host is not None:  # with several ranks the masks of the next rank are on the device only
        host = HostMasks(np.roll(host.attention, -1, axis=0)) if world()[1] == 1 else None
    return TokenRows(shift(first.input_ids), shift(first.attention_mask), host=host)


def _next_first(rows: Tensor) -> Tensor:
    """(B, ...) rows to (B, ...): each row is the next one of the global batch."""
    rank, ranks = world()
    of_next_rank = gather(rows[:1], [1] * ranks)[(rank + 1) % ranks]
    return torch.cat([rows[1:], of_next_rank[None]])
