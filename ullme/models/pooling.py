"""Pooling: hidden states to one vector per row, computed in float32 whatever the dtype of the weights.

The hidden states are packed: the real tokens of all rows are concatenated, so there is no padding to mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ullme.token_rows import HostMasks
from ullme.utils.dotted_names import named
from ullme.utils.transfer import to_device

POOLING_METHODS = ("mean", "weighted_mean", "first", "last")
# (T, D) hidden states and (R,) lengths -> (R, D); see pool
Pooling = Callable[[Tensor, Tensor], Tensor]


def custom_pooling(path: str) -> Pooling:
    """The user's pooling function with this dotted path. Raises: ValueError: there is no such function."""
    function = named(path, "pooling")
    if not callable(function):
        raise ValueError(f"pooling={path!r} is a {type(function).__name__}; name a function of (hidden, lengths)")
    return function


def pool(hidden: Tensor, lengths: Tensor, method: str = "mean") -> Tensor:
    """Pool the hidden states of each row into one vector.

    Args:
        hidden: (T, D) hidden states of the real tokens, row after row.
        lengths: (R,) tokens of each row, summing to T.
        method: ``mean``; ``weighted_mean``, with weight i for the i-th token, from 1 (SGPT, arXiv 2202.08904, eq. 2);
            ``first``; ``last``; or the dotted path of a function of ``hidden`` and ``lengths``.

    Returns:
        (R, D) in float32 (float64 for float64 hidden states).

    Raises:
        ValueError: an unknown method, or a function that returns something else than (R, D).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ends = lengths.cumsum(0)
    if method == "last":
        return hidden[ends - 1].to(dtype)
    if method == "first":
        return hidden[ends - lengths].to(dtype)
    if method == "mean":
        total = sum_rows(hidden.to(dtype), lengths)
        return total / lengths[:, None]
    if method == "weighted_mean":
        token = torch.arange(len(hidden), device=hidden.device)
        row = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths, output_size=len(hidden))
        position = token - (ends - lengths)[row] + 1
        total = sum_rows(hidden.to(dtype) * position[:, None], lengths)
        return total / (lengths * (lengths + 1) / 2)[:, None]
    if "." in method:
        pooled = custom_pooling(method)(hidden, lengths)
        if not isinstance(pooled, Tensor) or pooled.shape != (len(lengths), hidden.shape[1]):
            returned = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            expected = (len(lengths), hidden.shape[1])
            raise ValueError(f"pooling={method!r} returned {returned}; it must return a tensor of shape {expected}")
        return pooled.to(dtype)
    raise ValueError(f"pooling={method!r} is unknown; choose one of {', '.join(POOLING_METHODS)}")


def sum_rows(values: Tensor, lengths: Tensor) -> Tensor:
    """(R, ...) sums over the rows of packed values (T, ...).

    ``unsafe`` leaves out the check that lengths (R,) sum to T, for which a GPU would have to be waited for.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def select_pooled(hidden: Tensor, masks: HostMasks) -> tuple[Tensor, Tensor]:
    """Select the hidden states of the tokens that are pooled, out of those that are attended to.

    Args:
        hidden: (T, D) hidden states of the real tokens, row after row.
        masks: of the R rows, with those of pooled tokens.

    Returns:
        (P, D) hidden states and (R,) pooled tokens of each row, the arguments of :func:`pool`.

    Raises:
        ValueError: a row without a pooled token.
    """
    assert masks.pooled is not None
    pooled = masks.pooled & masks.attention
    counts = pooled.sum(1)
    if (counts == 0).any():
        raise ValueError(f"pool_mask: row {int(counts.argmin())} has no token to pool; mark at least one in every row")
    places, lengths = to_device([np.flatnonzero(pooled[masks.attention]), counts], hidden.device)
    return hidden.index_select(0, places), lengths


def pool_padded(hidden: Tensor, attention_mask: Tensor, method: str = "mean") -> Tensor:
    """:func:`pool` for a padded block.

    Args:
        hidden: (R, L, D) hidden states.
        attention_mask: (R, L), padded on either side; it is not changed.
        method: as in :func:`pool`.

    Returns:
        (R, D) in float32 (float64 for float64 hidden states).
    """
    mask = attention_mask.bool()
    return pool(hidden[mask], mask.sum(dim=1), method)
