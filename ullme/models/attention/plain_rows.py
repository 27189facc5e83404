"""Attention of packed rows on a CPU, one call for each run of rows that are equally long, where the rows lie.

Consecutive rows of equal length are a block without padding, so PyTorch's kernel can read queries, keys and values from
the packed row and nothing is copied into groups, masked, or thrown away. Rows that embed together are sorted by length,
which makes such runs long. The kernel is called directly, as through :func:`scaled_dot_product_attention` the gradient
of every run would be a tensor as long as the packed row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ullme.models.attention.packed_rows import PackedRows

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def takes(query: Tensor, value: Tensor, rows: PackedRows) -> bool:
    """Whether :func:`attention` can run: on a CPU, where queries (1, H, T, head_dim) and values have heads of one width
    and no row continues another one."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not rows.has_parents


def attention(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float | None, causal: bool) -> Tensor:
    """Attention within packed rows, without window, cap or dropout.

    Args:
        query: (1, H, T, head_dim).
        key: (1, H_kv, T, head_dim).
        value: (1, H_kv, T, head_dim).
        rows: the layout of the T tokens.
        scale: of the scores; None is head_dim ** -0.5.
        causal: whether later tokens are masked.

    Returns:
        (1, T, H, head_dim).
    """
    return _PlainRows.apply(query, key, value, rows.runs, scale, causal)


class _PlainRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: list[tuple[int, int]],
        scale: float | None,
        causal: bool,
    ) -> Tensor:
        ctx.runs, ctx.keywords = runs, {"dropout_p": 0.0, "is_causal": causal, "scale": scale}
        repeats = query.shape[1] // key.shape[1]
        found = [
            _forward(q, _repeated(k, repeats), _repeated(v, repeats), **ctx.keywords)
            for q, k, v in zip(*(_blocks(x, runs) for x in (query, key, value)), strict=True)
        ]
        out = _packed([block for block, _ in found])
        ctx.save_for_backward(query, key, value, out, *(logsumexp for _, logsumexp in found))
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *logsumexps = ctx.saved_tensors
        heads = key.shape[1]
        repeats = query.shape[1] // heads
        gradients = []
        tensors = (grad.transpose(1, 2), query, key, value, out)
        for *block, logsumexp in zip(*(_blocks(x, ctx.runs) for x in tensors), logsumexps, strict=True):
            g, q, k, v, o = block
            dq, dk, dv = _backward(g, q, _repeated(k, repeats), _repeated(v, repeats), o, logsumexp, **ctx.keywords)
            gradients.append((dq, _summed(dk, repeats), _summed(dv, repeats)))
        return *(_packed(list(blocks)) for blocks in zip(*gradients, strict=True)), None, None, None


def _blocks(x: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """The runs of (1, H, T, head_dim) as views, (n, H, l, head_dim) each."""
    parts = x[0].split([n * length for n, length in runs], dim=1)
    return [part.unflatten(1, run).transpose(0, 1) for part, run in zip(parts, runs, strict=True)]


def _packed(blocks: list[Tensor]) -> Tensor:
    """(1, H, T, head_dim), the opposite of :func:`_blocks`; the heads of a token are contiguous in memory."""
    return torch.cat([block.transpose(1, 2).flatten(0, 1) for block in blocks]).transpose(0, 1)[None]


def _repeated(x: Tensor, repeats: int) -> Tensor:
    """(n, H, l, head_dim) keys or values, of which several query heads share one."""
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def _summed(gradient: Tensor, repeats: int) -> Tensor:
    """The gradient of what :func:`_repeated` repeated."""
    return gradient if repeats == 1 else gradient.unflatten(1, (-1, repeats)).sum(2)
