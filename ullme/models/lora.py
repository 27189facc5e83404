"""A faster forward and backward for PEFT's LoRA layers (arXiv 2106.09685, eq. 3).

PEFT computes ``W x`` and ``s B (A dropout(x))`` separately, then scales and adds. Each of these operations reads and
writes (T, out) values, which costs more than LoRA's products. Here ``s B A x`` is accumulated into ``W x`` in place.
Without dropout and in full precision, ``W + s B A`` is computed first, in forward and in backward, so that both cost
hardly more than the layer without LoRA.

PEFT's modules, weight names and file formats do not change, only the class of :class:`peft.tuners.lora.Linear` modules.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

logger = logging.getLogger(__name__)


@contextmanager
def without_deprecation_warning() -> Iterator[None]:
    """Silence the one warning that wrapping a model with PEFT (up to 0.21) gives under transformers 5.2x.

    PEFT reads ``is_gradient_checkpointing``, which transformers has renamed; nobody who calls ULLME can change that.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


class LoraLinear(Linear):
    """PEFT's LoRA layer with a faster forward for one adapter on a plain ``nn.Linear``; other cases go to PEFT.

    LoRA's products are computed in the dtype of the activations; A, B and their gradients stay in float32.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        name = self._single_plain_adapter()
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
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return _Lora.apply(x, weight, bias, a, b, self.scaling[name], probability)

    def _single_plain_adapter(self) -> str | None:
        """The name of the active adapter, or None if PEFT's own forward is needed."""
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
            and "forward" not in vars(base)  # replaced, e.g. by an offloading hook
            and not (base.weight.requires_grad or base._forward_hooks or base._forward_pre_hooks)
        )
        return name if plain else None


def install(model: nn.Module) -> None:
    """Give LoRA layers on a plain ``nn.Linear`` in a PEFT model the forward of :class:`LoraLinear`."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear


def set_dropout(model: nn.Module, adapter: str, probability: float) -> None:
    """Set LoRA's dropout in all layers but the experts of a mixture of experts.

    Experts that are one parameter are adapted by adding ``s B A`` to it, so there is no input to drop from, and PEFT
    refuses a config with dropout for them. So the config keeps 0 there, and what was saved can be loaded.
    """
    if probability == 0:
        return
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and adapter in module.lora_dropout]
    inputs = [layer for layer in layers if not isinstance(layer, ParamWrapper)]
    for layer in inputs:
        layer.lora_dropout[adapter] = nn.Dropout(probability)
    if len(inputs) == len(layers):
        config: Any = model.peft_config
        config[adapter].lora_dropout = probability
    else:
        logger.warning(
            "lora_dropout=%s: %d adapters of experts have no dropout, the other %d have it",
            probability,
            len(layers) - len(inputs),
            len(inputs),
        )


@torch.no_grad()
def merge(model: Any, safe: bool = False) -> Any:
    """The LLM with the adapter merged into its weights.

    A head that shares its weight with the embedding gets a copy of its own first, if either has an adapter: the adapter
    changes only one of them.

    Args:
        model: the PEFT model, which cannot be used afterwards.
        safe: check that the merged weights are finite.

    Raises:
        ValueError: they are not.
    """
    llm: Any = model.get_base_model()
    table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    adapted = isinstance(table, LoraLayer) or isinstance(head, LoraLayer)
    if head is not None and adapted and head.weight is table.weight:
        inner = head.get_base_layer() if isinstance(head, LoraLayer) else head
        inner.weight = nn.Parameter(inner.weight.clone(), requires_grad=False)  # type: ignore[operator]
        llm.config.get_text_config().tie_word_embeddings = llm.config.tie_word_embeddings = False
    return model.merge_and_unload(safe_merge=safe)


def modules_to_exclude(model: nn.Module) -> list[str]:
    """Names of linear layers to which LoRA cannot be added, and which "all-linear" must exclude.

    These are subclasses of ``nn.Linear`` that compute something else (routers, grouped projections), and the output
    projections of Mamba mixers, whose kernel reads the weight without calling the layer.
    """
    excluded = []
    for name, module in model.named_modules():
        cls = type(module)
        subclass = isinstance(module, nn.Linear) and cls.__module__.startswith("transformers.models")
        if subclass and cls.forward is not nn.Linear.forward and not _computes_linear(module):
            excluded.append(name)
        is_mixer = "mamba" in cls.__name__.lower() or "mixer" in cls.__name__.lower()
        if is_mixer and isinstance(getattr(module, "out_proj", None), nn.Linear):
            excluded.append(f"{name}.out_proj")
    return excluded


@torch.no_grad()
def _computes_linear(layer: nn.Linear) -> bool:
    """Whether a layer that overrides ``forward`` still computes W x + b, as Falcon's does."""
    if layer.weight.is_meta:  # has no numbers to compare, and any will do
        layer = copy.deepcopy(layer).to_empty(device="cpu")
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    x = x.view(1, 2, layer.in_features)
    try:
        y = layer(x)
    except Exception:  # e.g. a router that takes other arguments or shapes
        return False
    expected = linear(x, layer.weight, layer.bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-2, atol=1e-2)


def _merging_is_cheaper(x: Tensor, weight: Tensor) -> bool:
    """Whether to compute W + s B A first: not for few rows, nor in half precision, which would lose the update.

    Nor in a compiled graph, which would hold for either few or many rows.
    """
    if torch.compiler.is_compiling():
        return False
    rows, (out, width) = x.numel() // x.shape[-1], weight.shape
    return weight.dtype.itemsize >= 4 and rows * (out + width) > 2 * out * width


class _Lora(torch.autograd.Function):
    """``x W^T + bias + scale · dropout(x) A^T B^T`` with frozen W and bias.

    ``scale`` multiplies products of rank r only. Of dropout, the mask is kept (one byte a value) and not the input.

    Shapes: x (..., in); W (out, in); bias (out,) or None; A (r, in); B (out, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        probability: float,
    ) -> Tensor:
        ctx.scale, ctx.keep = scale, 1 / (1 - probability) if probability < 1 else 0.0
        ctx.merged = not probability and _merging_is_cheaper(x, weight)
        if ctx.merged:
            ctx.save_for_backward(x, weight, a, b, None, None)
            return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)
        dropped, mask = torch.native_dropout(x, probability, True) if probability else (x, None)
        down = (dropped.flatten(0, -2) @ a.T).mul_(scale)  # (T, r)
        ctx.save_for_backward(x, weight, a, b, mask, down)
        y = linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(down, b.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, mask, down = ctx.saved_tensors
        flat_grad = grad.flatten(0, -2)  # (T, out)
        dropped = (x if mask is None else x * mask).flatten(0, -2)  # (T, in); its factor 1 / (1 - p) is in grad_down
        down = (dropped @ a.T).mul_(ctx.scale) if down is None else down
        grad_b = torch.mm(down.T, flat_grad).T
        grad_down = (flat_grad @ b).mul_(ctx.scale * ctx.keep)  # (T, r)
        grad_a = torch.mm(grad_down.T, dropped)
        del dropped  # as large as grad_x
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.merged:
                grad_x = flat_grad @ torch.addmm(weight, b, a, alpha=ctx.scale)
            elif mask is None:
                grad_x = (flat_grad @ weight).addmm_(grad_down, a)
            else:
                grad_x = (grad_down @ a).mul_(mask.flatten(0, -2)).addmm_(flat_grad, weight)
            grad_x = grad_x.view_as(x)
        return grad_x, None, None, grad_a, grad_b, None, None
