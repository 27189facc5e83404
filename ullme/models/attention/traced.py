"""Packed attention as one operation of a graph that torch.compile traces: what is inside depends on the rows' lengths.

Only the numbers of tokens and rows are in the graph's shapes, and these are dynamic, so a layer is one graph for all
lengths. The layout of the rows travels as a tensor on the host, from which the operation reads the lengths as it runs.
On CUDA the flash kernel, an operation of torch, is traced instead where it has the heads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ullme.models.attention.packed_rows import PackedRows

# Chunks whose layouts are kept: those between a forward and its backward, if layers are not recomputed.
_KEPT = 64


@torch.library.custom_op("ullme::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    scale: float | None,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention within packed rows, without dropout.

    Args:
        query: (1, H, T, head_dim).
        key: (1, H_kv, T, head_dim).
        value: (1, H_kv, T, head_dim of values).
        layout: (1 + 2R,) int64 on the host, see :attr:`~ullme.models.attention.packed_rows.PackedRows.layout`.
        scale: of the scores; None is head_dim ** -0.5.
        causal: whether later tokens are masked.
        window: sliding window in tokens; 0 is none.
        softcap: of the scores; 0 is none.

    Returns:
        (1, T, H, head_dim of values).
    """
    return _attention(query, key, value, layout, scale, causal, window, softcap).contiguous()


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty(1, tokens, heads, value.shape[-1])


# Not a custom_op: below that autograd is switched off, and this operation differentiates.
torch.library.define(
    "ullme::packed_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor layout, float? scale, bool causal, SymInt window, "
    "float softcap) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("ullme::packed_attention_backward", "default")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    scale: float | None,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; the forward runs again, so its dropout-free results are the same."""
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    with torch.enable_grad():
        out = _attention(q, k, v, layout, scale, causal, window, softcap)
    return tuple(x.contiguous() for x in torch.autograd.grad(out, (q, k, v), grad))


@torch.library.register_fake("ullme::packed_attention_backward")
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = torch.ops.ullme.packed_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None, None)


packed_attention.register_autograd(_differentiate, setup_context=_keep)


def _attention(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, *options: Any) -> Tensor:
    """The arguments are those of :func:`packed_attention`."""
    from ullme.models.attention import packing

    scale, causal, window, softcap = options
    rows = _rows(layout.numpy().tobytes(), query.device)
    smaller = window if 0 < window < rows.max_keys else None
    return packing._grouped_attention(query, key, value, rows, scale, causal, smaller, softcap or None, 0.0)


@lru_cache(maxsize=_KEPT)
def _rows(layout: bytes, device: torch.device) -> PackedRows:
    """The rows of a layout, the same object for all layers."""
    numbers, *rest = np.frombuffer(layout, dtype=np.int64)
    lengths, parents = np.array(rest).reshape(2, numbers)
    return PackedRows(lengths, device, parents if (parents >= 0).any() else None)
