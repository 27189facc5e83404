"""LoRA (arXiv 2106.09685, eq. 3) next to a frozen linear layer, without passes over memory that it does not need.

PEFT computes ``W x`` and ``s B (A drop(x))`` apart, scales and adds; each of these reads and writes (T, out) numbers,
in both directions, which costs more than LoRA's multiplications. Here the small product is accumulated into the large
one. Without dropout and in full precision W + s B A is formed first: then the forward costs what the bare layer costs.

PEFT's modules, their names and their files stay: only the class of :class:`peft.tuners.lora.Linear` modules changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


@contextmanager
def without_deprecation_warning() -> Iterator[None]:
    """Silence the one warning that wrapping a model with PEFT (up to 0.21) gives under transformers 5.2x.

    PEFT reads ``is_gradient_checkpointing``, which transformers has renamed; nobody who calls ULLME can change that.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


class LoraLinear(Linear):
    """PEFT's LoRA layer with a forward of its own for the usual case: one adapter, on a plain ``nn.Linear``.

    The small product is computed in the activations' dtype; A, B and their gradients keep their own (float32).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        name = self._only_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        down, up = self.lora_A[name], self.lora_B[name]
        assert isinstance(down, nn.Linear)
        assert isinstance(up, nn.Linear)
        x, weight, a, b = (t.to(dtype) for t in (x, base.weight, down.weight, up.weight))
        bias = None if base.bias is None else base.bias.to(dtype)
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.training else None
        return _Lora.apply(x, dropped, weight, bias, a, b, self.scaling[name])

    def _only_adapter(self) -> str | None:
        """The adapter's name, or None where PEFT's own forward has more to do."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        plain = (
            name in self.lora_A
            and name not in self.lora_variant
            and self.lora_A[name].bias is None
            and self.lora_B[name].bias is None
            and type(base) is nn.Linear
            and "forward" not in vars(base)  # replaced by an offloading hook, for example
            and not (base.weight.requires_grad or base._forward_hooks or base._forward_pre_hooks)
        )
        return name if plain else None


def install(model: nn.Module) -> None:
    """Let the LoRA layers of a PEFT model that stand on a plain ``nn.Linear`` use :class:`LoraLinear`'s forward."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear


def unfit(model: nn.Module) -> list[str]:
    """Names of linear layers that LoRA cannot stand on, which "all-linear" has to leave out.

    Those are routers and grouped projections, which a family derives from ``nn.Linear`` but which compute something
    else, and the projections behind a Mamba mixer, whose kernel reads their weights without calling them.
    """
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        own = isinstance(module, nn.Linear) and kind.__module__.startswith("transformers.models")
        if own and kind.forward is not nn.Linear.forward and not _is_linear(module):
            found.append(name)
        mixes = "mamba" in kind.__name__.lower() or "mixer" in kind.__name__.lower()
        if mixes and isinstance(getattr(module, "out_proj", None), nn.Linear):
            found.append(f"{name}.out_proj")
    return found


@torch.no_grad()
def _is_linear(layer: nn.Linear) -> bool:
    """Whether a layer with a forward of its own still is W x + b (as Falcon's)."""
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    x = x.view(1, 2, layer.in_features)
    try:
        y = layer(x)
    except Exception:  # a router may want more than one argument, or another shape
        return False
    expected = linear(x, layer.weight, layer.bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-2, atol=1e-2)


def _merge(x: Tensor, weight: Tensor) -> bool:
    """Whether to form W + s B A. Half precision would round the update away; few rows would not pay for it."""
    rows, (out, width) = x.numel() // x.shape[-1], weight.shape
    return weight.dtype.itemsize >= 4 and rows * (out + width) > 2 * out * width


class _Lora(torch.autograd.Function):
    """``x W^T + bias + scale · dropped A^T B^T``; W and bias are frozen.

    Shapes: x and dropped (x after dropout, or None without) (..., in); W (out, in); bias (out,) or None; A (r, in);
    B (out, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        seen = x if dropped is None else dropped
        ctx.save_for_backward(seen, weight, a, b)
        ctx.scale, ctx.dropout = scale, dropped is not None
        if dropped is None and _merge(x, weight):
            return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)
        y = linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(seen.flatten(0, -2) @ a.T, b.T, alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight, a, b = ctx.saved_tensors
        rows, wide = seen.flatten(0, -2), grad.flatten(0, -2)
        small = wide @ b  # (T, r)
        grad_a = torch.mm(small.T, rows).mul_(ctx.scale)
        grad_b = torch.mm(wide.T, rows @ a.T).mul_(ctx.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = wide @ weight
        if ctx.dropout and ctx.needs_input_grad[1]:
            grad_dropped = torch.mm(small, a).mul_(ctx.scale).view_as(seen)
        elif grad_x is not None:
            grad_x.addmm_(small, a, alpha=ctx.scale)
        return None if grad_x is None else grad_x.view_as(seen), grad_dropped, None, None, grad_a, grad_b, None
