"""Rotary position embedding (arXiv 2104.09864, eq. 34) on a CPU with a third of the passes over memory.

transformers' modelling files compute ``x · cos + rotate_half(x) · sin`` with five operations, and their backward fills
and adds whole tensors for every slice. Each file calls a function of its own, ``apply_rotary_pos_emb``. It is replaced
in the file of the loaded model, if it is equal, by one that computes the same in float32 on a CPU and otherwise calls
the original; so this holds for every model of that family in the process.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_NAME = "apply_rotary_pos_emb"
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]
Rotate = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: nn.Module) -> None:
    """Replace the rotation in the modelling files of ``model`` that compute it as above."""
    for name in {type(module).__module__ for module in model.modules()}:
        source: Any = sys.modules.get(name)
        original = vars(source).get(_NAME) if name.startswith("transformers.") and source is not None else None
        if original is not None and not hasattr(original, "ullme_original") and _is_standard(original):
            setattr(source, _NAME, _fused(original))


def _fused(original: Rotate) -> Rotate:
    @wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        same = q.dtype == k.dtype == cos.dtype == torch.float32 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        if torch.compiler.is_compiling() or q.device.type != "cpu" or not same:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)

    vars(apply_rotary_pos_emb)["ullme_original"] = original
    return apply_rotary_pos_emb


class _Rotate(torch.autograd.Function):
    """With halves x = (a, b): (a · cos - b · sin, b · cos + a · sin), each half with its own cos and sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, L, head_dim); cos and sin (B, 1, L, head_dim), without gradient."""
        ctx.save_for_backward(cos, sin)
        out = x * cos
        (a, b), (sin_a, sin_b), (out_a, out_b) = (t.chunk(2, dim=-1) for t in (x, sin, out))
        out_a.addcmul_(b, sin_a, value=-1)
        out_b.addcmul_(a, sin_b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        out = grad * cos
        (a, b), (sin_a, sin_b), (out_a, out_b) = (t.chunk(2, dim=-1) for t in (grad, sin, out))
        out_a.addcmul_(b, sin_b)
        out_b.addcmul_(a, sin_a, value=-1)
        return out, None, None


def _is_standard(original: Rotate) -> bool:
    """Whether a function has these parameters and computes the formula above, in float64 and for any cos and sin."""
    try:
        if list(inspect.signature(original).parameters) != _PARAMETERS:
            return False
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)]
        q, k, cos, sin = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        found = original(q, k, cos, sin)
        ours = [_Rotate.apply(x, cos[:, None], sin[:, None]) for x in (q, k)]
        return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, ours, strict=True))
    except Exception:  # another kind of function
        return False
