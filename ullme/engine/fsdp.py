"""The LLM split over ranks (FSDP), decoder layer by decoder layer; an adapter stays whole on every rank.

LoRA weights are a few per cent of the LLM, in float32 beside a bfloat16 LLM. Split, they would need a group of their
own in every layer (a group has one type) and many small collectives; whole, they are trained as under DDP: their
gradients are averaged once a step (:func:`ullme.distributed.average_gradients`), their optimizer state is whole, and
a checkpoint is the same under every strategy. What is split is what takes the memory. Without an adapter all weights
are split, and so are their gradients and optimizer states.

Both kinds of FSDP wrap the :class:`~ullme.models.ULLME`, whose forward is the only way into the LLM, and not the
LightningModule around it, whose ``training_step`` holds many forwards and backwards.

Knows PyTorch and ULLME: no Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ullme.distributed import broadcast
from ullme.models.attention import decoder_layers
from ullme.models.rank_zero import Weights, loading_on_rank_zero
from ullme.models.trained_weights import trainable_shapes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecision

    from ullme.models.ullme import ULLME


def split_modules(model: ULLME) -> list[tuple[nn.Module, str, nn.Module]]:
    """The decoder layers, as (parent, name in the parent, layer).

    A layer is what transformers says may not be split over devices (``_no_split_modules``), those inside another left
    out; where a family says nothing, a member of the longest list of modules.
    """
    llm = model.causal_lm
    kinds = set(getattr(llm, "_no_split_modules", None) or ())
    members = set(decoder_layers(llm.base_model))
    found: list[tuple[nn.Module, str, nn.Module]] = []

    def walk(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            if type(child).__name__ in kinds and any(True for _ in child.parameters()):
                found.append((parent, name, child))
            else:
                walk(child)

    walk(llm)
    if not found:
        found = [(p, name, child) for p in llm.modules() for name, child in p.named_children() if child in members]
    return found


def _split(
    model: Any,
    device: torch.device,
    kind: str,
    split: Callable[[nn.Module, list[nn.Parameter]], nn.Module],
) -> Any:
    """Split a model layer by layer; what stays whole goes to the device, with rank 0's values.

    Args:
        model: whole on rank 0; on the others too, or built inside
            :func:`~ullme.models.rank_zero.loading_on_rank_zero`. Then rank 0 sends them each layer before it is split.
        device: of this rank.
        kind: of FSDP.
        split: splits a module, and leaves out those of its parameters that stay whole.
    """
    if model.options.quantization != "none":
        raise ValueError(
            f"quantization={model.options.quantization!r}: quantised weights are not split over ranks; set "
            "trainer.strategy=ddp (a copy on each GPU, which is small), or quantization=none"
        )
    trains_all = model.options.trained == "all"

    def whole(module: nn.Module) -> list[nn.Parameter]:
        return [] if trains_all else [p for p in module.parameters() if p.requires_grad]

    model._whole_shapes = trainable_shapes(model)
    model._split_by = kind
    layers = split_modules(model)
    weights = Weights(model, device) if model.is_on_rank_zero else None
    if weights is None:
        for parameter in whole(model):
            parameter.data = parameter.data.to(device)
        broadcast(whole(model))
    else:
        inside = {module for _, _, layer in layers for module in layer.modules()}
        weights.place([module for module in model.modules() if module not in inside])
    for parent, name, layer in layers:
        if weights is not None:
            weights.place(list(layer.modules()))
        setattr(parent, name, split(layer, whole(layer)))
    model.is_on_rank_zero = False
    return split(model, whole(model))


def shard_fsdp2(model: ULLME, mesh: DeviceMesh, device: torch.device) -> ULLME:
    """Split with ``torch.distributed.fsdp.fully_shard``, in place.

    Args:
        model: whole, as in :func:`_split`.
        mesh: one-dimensional.
        device: of this rank.
    """
    from torch.distributed.fsdp import fully_shard

    def split(module: nn.Module, whole: list[nn.Parameter]) -> Any:
        return fully_shard(module, mesh=mesh, ignored_params=set(whole))

    vars(model)["_split_alike"] = partial(shard_fsdp2, mesh=mesh, device=device)
    return _split(model, device, "fsdp2", split)


def split_alike(model: ULLME, build: Callable[[], ULLME]) -> ULLME:
    """Build another model and split it in the same way; under FSDP1 and without FSDP every rank holds it whole."""
    split = getattr(model, "_split_alike", None)
    if split is None:
        return build().to(model.device)
    with loading_on_rank_zero(model.device):
        other = build()
    return split(other)


def full_precision_buffers(mixed_precision: MixedPrecision | None, trains_all: bool) -> MixedPrecision | None:
    """FSDP1's mixed precision without what would change the numbers of the LLM.

    Lightning's bf16-mixed also casts buffers. Rotary frequencies (``inv_freq``) in bfloat16 rotate by other angles:
    the likelihood of a passage moves by up to a nat, and training would run another LLM than evaluation does.

    Args:
        mixed_precision: the strategy's, or None.
        trains_all: whether all weights are trained; their gradients are then summed over ranks in float32.
    """
    if mixed_precision is None:
        return None
    reduce_dtype = torch.float32 if trains_all else mixed_precision.reduce_dtype
    return replace(mixed_precision, buffer_dtype=None, reduce_dtype=reduce_dtype)


def shard_fsdp1(model: ULLME, device: torch.device, mixed_precision: MixedPrecision | None = None) -> ULLME:
    """Wrap with FullyShardedDataParallel, inside ``torch.distributed.fsdp.wrap.enable_wrap``.

    Args:
        model: whole, as in :func:`_split`.
        device: of this rank.
        mixed_precision: the strategy's; buffers keep their dtype whatever it says.
    """
    from torch.distributed.fsdp.wrap import wrap

    precision = full_precision_buffers(mixed_precision, model.options.trained == "all")

    def split(module: nn.Module, whole: list[nn.Parameter]) -> nn.Module:
        return wrap(module, device_id=device, ignored_states=whole, mixed_precision=precision)

    return _split(model, device, "fsdp1", split)


def split_by(model: ULLME) -> Literal["fsdp1", "fsdp2"] | None:
    """What split the model, if anything."""
    return getattr(model, "_split_by", None)


def whole_parameters(model: ULLME) -> list[nn.Parameter]:
    """Trained weights that this rank holds whole; nobody averages their gradients by itself."""
    if model.options.trained == "all" and split_by(model):
        return []
    return [p for p in model.parameters() if p.requires_grad]


def whole_state(model: ULLME) -> dict[str, Tensor]:
    """By the names of :func:`trainable_shapes`, the trained weights that this rank holds whole; nothing is gathered."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def copy_whole(model: ULLME, state: dict[str, Tensor]) -> None:
    """Put stored values, by the names of :func:`trainable_shapes`, into the weights that this rank holds whole."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(state[name.replace("_fsdp_wrapped_module.", "")])


@contextmanager
def unsynchronised(model: Any) -> Iterator[None]:
    """A backward whose gradients stay on this rank for now, where the weights themselves are split."""
    if whole_parameters(model):
        yield
    elif split_by(model) == "fsdp1":
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def clip_gradients(model: Any, largest: float | None) -> Tensor:
    """Clip the gradients of all ranks' parts together, in place.

    Args:
        model: split or whole.
        largest: the norm to clip to; None does not clip.

    Returns:
        The norm before, the same number on every rank.
    """
    largest = float("inf") if largest is None else largest
    if split_by(model) == "fsdp1" and not whole_parameters(model):
        return model.clip_grad_norm_(largest)
    norm: Any = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], largest)
    return norm if whole_parameters(model) else norm.full_tensor()
