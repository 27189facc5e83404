"""A gated MLP, ``down(SiLU(gate(x)) · up(x))`` (arXiv 2002.05202, eq. 6), that keeps less memory for backward.

Autograd keeps gate, up, SiLU(gate) and their product, which are the widest activations of a layer. SiLU(gate) is
computed again instead, for one pass over memory. Values and gradients are equal to the last bit.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fuse_gated_mlps(model: nn.Module) -> list[str]:
    """Give every MLP of this form inside ``model`` the forward of :class:`FusedGatedMLP`.

    Modules and weights stay the same; their class becomes a subclass of the model's own.

    Returns:
        The names of the replaced classes, sorted.
    """
    found: dict[Any, bool] = {}
    for module in model.modules():
        cls: Any = type(module)
        if cls.__module__.startswith("transformers.") and dict(module.named_children()).keys() == _PARTS:
            if cls not in found:
                found[cls] = _is_gated_silu(module)
            if found[cls]:
                module.__class__ = _fused_class(cls)
    return sorted(cls.__name__ for cls, fused in found.items() if fused)


class FusedGatedMLP(nn.Module):
    """The first base of an MLP that :func:`fuse_gated_mlps` replaced."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if torch.compiler.is_compiling():  # which decides itself what to keep
            return super().forward(x)
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))


class _GatedSiLU(torch.autograd.Function):
    """SiLU(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


@cache
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{cls.__name__}", (FusedGatedMLP, cls), {"__module__": __name__})


@torch.no_grad()
def _is_gated_silu(mlp: nn.Module) -> bool:
    """Whether the module computes the formula; tried on a copy with small projections."""
    if type(mlp.act_fn) is not nn.SiLU:
        return False
    small = copy.copy(mlp)
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (5, 3), "up_proj": (5, 3), "down_proj": (3, 5)}
    layers = {name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in shapes.items()}
    for layer in layers.values():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    small._modules = {**layers, "act_fn": nn.SiLU()}
    x = torch.randn(4, 3, generator=generator)
    gate, up, down = layers.values()
    try:
        return torch.equal(small(x), down(silu(gate(x)) * up(x)))
    except Exception:  # it takes other arguments, or reads other attributes of its projections
        return False
