"""Replace what a model writes as many small operations by fused ones that compute the same.

``gelu_new`` is nine elementwise kernels that each read and write all values; ``gelu(approximate="tanh")`` is one. A
module is replaced only if its values and gradients equal the fused ones. This is checked on the CPU, so also for a
model without memory (the meta device), and once for each class.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ullme.models.fused_mlp import fuse_gated_mlps

logger = logging.getLogger(__name__)

_HALF = (torch.float16, torch.bfloat16)
_ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (lambda: nn.GELU("tanh"), nn.GELU, nn.SiLU, nn.ReLU, nn.Mish)


def fuse(model: nn.Module) -> list[str]:
    """Replace activations, RMS norms and gated MLPs inside ``model`` where a fused one is equal.

    Norms and MLPs stay the same modules with the same weights; their class becomes a subclass of the model's own.

    Returns:
        The names of the replaced classes, sorted.
    """
    found: dict[Any, Callable[[nn.Module], nn.Module] | None] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            key = _key(child)
            if key is None:
                continue
            if key not in found:
                found[key] = _fused_norm(child) if key[1] else _fused_activation(child)
            if (make := found[key]) is not None:
                setattr(parent, name, make(child).train(child.training))
    replaced = sorted({key[0].__name__ for key, make in found.items() if make is not None} | {*fuse_gated_mlps(model)})
    if replaced:
        logger.info("fused versions of %s are used: they compute the same", ", ".join(replaced))
    return replaced


def _key(module: nn.Module) -> tuple[Any, ...] | None:
    """What modules with the same check have in common: (class, width of a norm or 0, other settings); None for
    modules that are neither an activation of transformers nor an RMS norm."""
    cls = type(module)
    if vars(module).get("forward") is not None or module._forward_hooks or module._forward_pre_hooks:
        return None
    own = {name: value for name, value in vars(module).items() if isinstance(value, float | int | str)}
    settings = tuple(sorted((name, str(value)) for name, value in own.items() if name != "training"))
    if cls.__module__ == "transformers.activations" and not any(True for _ in module.parameters()):
        return cls, 0, settings
    if cls.__name__.endswith("RMSNorm") and cls.__module__.startswith("transformers."):
        parameters = dict(module.named_parameters())
        if set(parameters) == {"weight"} and parameters["weight"].dim() == 1 and _eps(module) is not None:
            return cls, len(parameters["weight"]), (*settings, parameters["weight"].dtype)
    return None


def _eps(norm: nn.Module) -> float | None:
    values = [vars(norm).get(name) for name in ("variance_epsilon", "eps")]
    return next((value for value in values if isinstance(value, float)), None)


def _same(ours: Callable[[Tensor], Tensor], theirs: nn.Module, x: Tensor, tolerance: float) -> bool:
    """Whether outputs and gradients of the input are equal, relative to the largest value."""
    try:
        results = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            with torch.enable_grad():
                y = module(leaf)
                (gradient,) = torch.autograd.grad(y, leaf, torch.linspace(0.5, 1.5, y.numel()).view_as(y).to(y.dtype))
            results.append((y.detach(), gradient))
    except Exception:  # a module that takes other arguments, or has another shape of output, stays as it is
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
        for a, b in zip(*results, strict=True)
    )


def _fused_activation(activation: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """A function that makes the equal fused activation, or None. Compared in float64, where no rounding hides a
    difference."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    plain = copy.deepcopy(activation).cpu()
    for make in _ACTIVATIONS:
        if _same(make(), plain, x, 1e-14):
            return lambda _: make()
    return None


def _fused_norm(norm: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """A function that gives a norm the equal fused forward, or None.

    Compared in float32, and in the weight's dtype to a few roundings: in half precision most models round before they
    multiply by the weight, and the fused kernel after it.
    """
    cls: Any = type(norm)
    weight, eps = cast(nn.Parameter, norm.weight), _eps(norm)
    assert eps is not None
    generator = torch.Generator().manual_seed(0)
    x, values = (torch.randn(n, len(weight), generator=generator) * 2 for n in (3, 1))
    plain = copy.deepcopy(norm).to_empty(device="cpu")
    plain.weight = nn.Parameter(values[0], requires_grad=False)
    for offset in (0.0, 1.0):

        def torchs(x: Tensor, offset: float = offset) -> Tensor:
            return _rms_norm(x, cast(Tensor, plain.weight) + offset, eps)

        def frozen(x: Tensor, offset: float = offset) -> Tensor:
            return _FrozenRMSNorm.apply(x, cast(Tensor, plain.weight) + offset, eps)

        equal = _same(torchs, plain.float(), x, 1e-5) and _same(frozen, plain, x, 1e-5)
        if equal and weight.dtype in _HALF:
            equal = _same(torchs, plain.to(weight.dtype), x.to(weight.dtype), 4 * torch.finfo(weight.dtype).eps)
        if equal:
            return partial(_with_fused_forward, _fused_class(cls), eps, offset)
        plain.float()
    return None


def _with_fused_forward(cls: type[nn.Module], eps: float, offset: float, norm: nn.Module) -> nn.Module:
    norm.__class__ = cls
    vars(norm).update(fused_eps=eps, fused_offset=offset)
    return norm


@cache
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{cls.__name__}", (FusedRMSNorm, cls), {"__module__": __name__})


class FusedRMSNorm(nn.Module):
    """The first base of a fused norm: ``x / sqrt(mean(x²) + eps) · (offset + weight)`` (arXiv 1910.07467, eq. 4).

    On a GPU :func:`torch.nn.functional.rms_norm` is one kernel. On a CPU it is not, so there a frozen norm in float32
    has a forward and backward with half as many passes over memory. In all other cases the model's own forward runs.

    Attributes:
        fused_eps: of the model.
        fused_offset: 1 for families that store the weight's distance from 1 (Gemma), else 0.
    """

    weight: nn.Parameter
    fused_eps: float
    fused_offset: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weight: Tensor = self.weight
        # torch.compile fuses the model's own operations itself
        if x.dtype == weight.dtype and x.dtype != torch.float64 and not torch.compiler.is_compiling():
            if x.is_cuda:
                with torch.autocast("cuda", enabled=False):
                    return _rms_norm(x, weight + self.fused_offset if self.fused_offset else weight, self.fused_eps)
            if x.device.type == "cpu" and x.dtype == torch.float32 and not weight.requires_grad:
                return _FrozenRMSNorm.apply(x, weight + self.fused_offset, self.fused_eps)
        return super().forward(x)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nn.functional.rms_norm(x, weight.shape, weight, eps)


class _FrozenRMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps) and h = grad · weight, the gradient of x is r (h - x r² mean(h x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        h = grad * weight
        factor = torch.linalg.vecdot(h, x)[..., None] * scale.square() / -x.shape[-1]
        return h.addcmul_(x, factor).mul_(scale), None, None
