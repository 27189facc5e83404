"""Load an LLM that will be split over ranks on rank 0 alone.

The other ranks build the same modules without memory (on the meta device). When the model is split, decoder layer by
decoder layer, each layer's weights are sent from rank 0 to all ranks' devices (:class:`Weights`), so no other rank ever
holds more than one whole layer and what is outside the layers. So a machine reads and holds an LLM once, not once for
each of its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ullme.distributed import broadcast, from_rank_zero, world

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ullme.models.config import BackboneConfig

T = TypeVar("T")
META = torch.device("meta")
_device: ContextVar[torch.device | None] = ContextVar("device_of_split_model", default=None)


@contextmanager
def loading_on_rank_zero(device: torch.device) -> Iterator[None]:
    """Inside, a :class:`~ullme.models.ULLME` has its weights on rank 0 alone, until it is split.

    Args:
        device: of this rank, to which the split weights will go.
    """
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def split_device() -> torch.device | None:
    """Where the weights of the model that is being built will be split; None if every rank loads its own."""
    return _device.get()


def of_rank_zero(make: Callable[[], T]) -> T:
    """``make()``; inside :func:`loading_on_rank_zero` rank 0 alone calls it, and every rank gets the result."""
    if _device.get() is None:
        return make()
    token = _device.set(None)  # make() itself may build a model, which the other ranks do not
    try:
        return from_rank_zero(make)
    finally:
        _device.reset(token)


def load(
    make: Callable[[], tuple[PreTrainedModel, nn.Module | None]], config: PretrainedConfig, options: BackboneConfig
) -> tuple[PreTrainedModel, nn.Module | None]:
    """``make()``, the LLM and an earlier pooler; the same LLM without memory on ranks that do not load it.

    Raises:
        ValueError: ``make()`` did on rank 0, or the LLM's checkpoint has other modules than its config describes.
    """
    if _device.get() is None:
        return make()
    loaded: list[tuple[PreTrainedModel, nn.Module | None]] = []

    def describe() -> tuple[list[Place], nn.Module | None]:
        loaded.append(make())
        return _places(loaded[0][0]), loaded[0][1]

    places, pooler = of_rank_zero(describe)
    return loaded[0] if loaded else (_without_memory(config, options, places), pooler)


def _without_memory(config: PretrainedConfig, options: BackboneConfig, places: list[Place]) -> PreTrainedModel:
    """The LLM of ``config`` on the meta device, with the types and ties of the weights that rank 0 has loaded."""
    from transformers import AutoModelForCausalLM

    extra = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    with META:
        # a model built from a config writes to it
        model = AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=options.trust_remote_code, **extra)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    tensors: dict[int, Tensor] = {}
    ours, theirs = (
        {f"{place.path}.{place.name}" for place in found if place.kind == "parameter"}
        for found in (_places(model), places)
    )
    if different := sorted(ours ^ theirs):
        raise ValueError(
            f"model_name_or_path={options.model_name_or_path!r}: its weights have other names than its config "
            f"describes ({', '.join(different[:3])}), so it cannot be split over ranks; set trainer.strategy=ddp"
        )
    for place in places:
        if place.number not in tensors:
            tensors[place.number] = torch.empty(place.shape, dtype=place.dtype, device=META)
        place.put(modules[place.path], tensors)
    return model.eval()


@dataclass(frozen=True)
class Place:
    """Where a module holds a tensor.

    Args:
        path: of the module, from the model.
        kind: ``parameter``, ``buffer`` or ``attribute``.
        name: in the module.
        number: of the tensor; tied weights have the same.
        shape: of the tensor.
        dtype: of the tensor.
        value: of an attribute, which no device holds.
    """

    path: str
    kind: str
    name: str
    number: int
    shape: torch.Size
    dtype: torch.dtype
    value: Tensor | None = None

    def get(self, module: nn.Module) -> Tensor:
        """The tensor there."""
        return getattr(module, self.name)

    def put(self, module: nn.Module, tensors: dict[int, Any]) -> None:
        """Put the tensor of this number there; a new parameter is kept for the places that are tied to it."""
        if self.kind == "parameter":
            old, new = module._parameters.get(self.name), tensors[self.number]
            if not isinstance(new, nn.Parameter):
                new = tensors[self.number] = nn.Parameter(new, old is not None and old.requires_grad)
            module._parameters[self.name] = new
        elif self.kind == "buffer":
            module._buffers[self.name] = tensors[self.number]
        else:
            setattr(module, self.name, self.value)


def _places(model: nn.Module) -> list[Place]:
    """Every place of a tensor in a model, module after module."""
    numbers: dict[int, int] = {}
    found = []
    for path, module in model.named_modules():
        for kind, tensors in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        ):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    number = numbers.setdefault(id(tensor), len(numbers))
                    value = tensor.detach().cpu() if kind == "attribute" and tensor.device != META else None
                    found.append(Place(path, kind, name, number, tensor.shape, tensor.dtype, value))
    return found


class Weights:
    """Rank 0's weights, for a model that the other ranks hold without memory.

    Args:
        model: with the same modules on every rank; not yet split.
        device: of this rank.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._modules = dict(model.named_modules())  # splitting changes their paths
        self._places: list[Place] = from_rank_zero(lambda: _places(model))
        self._placed: dict[int, Tensor] = {}

    def place(self, modules: Sequence[nn.Module]) -> None:
        """Move the tensors of these modules to the device, with rank 0's values."""
        wanted = set(modules)
        for place in self._places:
            module = self._modules[place.path]
            if module not in wanted:
                continue
            if place.kind != "attribute" and place.number not in self._placed:
                self._placed[place.number] = self._sent(place, module)
            place.put(module, self._placed)

    def _sent(self, place: Place, module: nn.Module) -> Tensor:
        """Rank 0's tensor on the device. Its parameters stay the same objects there."""
        tensor = place.get(module)
        if world()[0] == 0:
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(self.device)
            else:
                tensor = tensor.to(self.device)
        else:
            tensor = torch.empty(place.shape, dtype=place.dtype, device=self.device)
        broadcast([tensor])
        return tensor
