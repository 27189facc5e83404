"""From hidden states to one vector a text, in float32 whatever the weights' dtype.

Pooling works on the packed form, the real tokens of all rows behind one another, and so never sees padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ullme.utils.dotted_names import named

POOLING_METHODS = ("mean", "weighted_mean", "first", "last")
# (T, D) hidden states and (R,) lengths -> (R, D); see pool
Pooling = Callable[[Tensor, Tensor], Tensor]


def own_pooling(path: str) -> Pooling:
    """A user's pooling, from the dotted path of its function. Raises: ValueError: there is no such function."""
    function = named(path, "pooling")
    if not callable(function):
        raise ValueError(f"pooling={path!r} is a {type(function).__name__}; name a function of (hidden, lengths)")
    return function


def pool(hidden: Tensor, lengths: Tensor, method: str = "mean") -> Tensor:
    """One vector a row.

    Args:
        hidden: (T, D) hidden states of the real tokens, row after row.
        lengths: (R,) tokens of each row, summing to T.
        method: ``mean``; ``weighted_mean``, the i-th token (from 1) weighing i (SGPT, arXiv 2202.08904, eq. 2);
            ``first``; ``last``; or the dotted path of a function of ``hidden`` and ``lengths``.

    Returns:
        (R, D) in float32 (float64 for float64 hidden states).

    Raises:
        ValueError: an unknown method, or a function that returns something else than (R, D).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    ends = lengths.cumsum(0)
    if method == "last":
        return hidden[ends - 1].to(wide)
    if method == "first":
        return hidden[ends - lengths].to(wide)
    if method == "mean":
        total = torch.segment_reduce(hidden.to(wide), "sum", lengths=lengths)
        return total / lengths[:, None]
    if method == "weighted_mean":
        token = torch.arange(len(hidden), device=hidden.device)
        row = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths, output_size=len(hidden))
        place = token - (ends - lengths)[row] + 1
        total = torch.segment_reduce(hidden.to(wide) * place[:, None], "sum", lengths=lengths)
        return total / (lengths * (lengths + 1) / 2)[:, None]
    if "." in method:
        pooled = own_pooling(method)(hidden, lengths)
        if not isinstance(pooled, Tensor) or pooled.shape != (len(lengths), hidden.shape[1]):
            found = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(f"pooling={method!r} returned {found} for {len(lengths)} rows of {hidden.shape[1]}")
        return pooled.to(wide)
    raise ValueError(f"pooling={method!r} is unknown; choose one of {', '.join(POOLING_METHODS)}")


def only_pooled(hidden: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out the states of tokens that are attended to but not pooled; a row's first pooled token is its first.

    Args:
        hidden: (T, D) hidden states of the real tokens, row after row.
        attention_mask: (R, L), 1 on the T real tokens.
        pool_mask: (R, L), 1 on the P real tokens that are pooled.

    Returns:
        (P, D) states and (R,) how many each row has, as :func:`pool` takes them.

    Raises:
        ValueError: a row without a pooled token.
    """
    pooled = pool_mask.bool() & attention_mask.bool()
    lengths = pooled.sum(dim=1)
    if (lengths == 0).any():
        raise ValueError(f"pool_mask: row {int(lengths.argmin())} has no token to pool; every text needs at least one")
    return hidden[pooled[attention_mask.bool()]], lengths


def pool_padded(hidden: Tensor, attention_mask: Tensor, method: str = "mean") -> Tensor:
    """:func:`pool` on padded states (R, L, D) with a mask (R, L), padded on either side; the mask is left as is.

    Returns:
        (R, D).
    """
    mask = attention_mask.bool()
    return pool(hidden[mask], mask.sum(dim=1), method)
