"""The layers of a decoder, and whether one looks ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ullme.models.attention.paths import text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATES = "hidden_states"

# What families call the reach of layers that look at their neighbourhood only.
_WINDOWS = (
    *("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention"),
    "attention_chunk_size",
)


def rounding(dtype: torch.dtype) -> float:
    """How far apart two ways to compute the same hidden states may come, relative to the largest.

    Kernels for other numbers of rows sum in another order, and layers add to that: measured up to 2e-5 in float32 for
    four layers of large weights. What the probe looks for (a row that sees another, padding, a look ahead) moves them
    by far more.
    """
    eps = torch.finfo(dtype).eps
    return (50 if eps > 1e-4 else 1000) * eps


@contextmanager
def short_windows(decoder: nn.Module, reach: int = 4) -> Iterator[None]:
    """Windows and chunks of ``reach`` tokens for as long as this is open.

    A path that forgets about windows is right on short rows and wrong on long ones; so it shows on short ones too.
    """
    owners: dict[int, Any] = {}
    for module in decoder.modules():
        owners[id(module)] = module
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            owners[id(config)] = config
    before = [
        (owner, name, wide)
        for owner in owners.values()
        for name in _WINDOWS
        if type(wide := vars(owner).get(name)) is int and wide > reach
    ]
    try:
        for owner, name, _ in before:
            setattr(owner, name, reach)
        yield
    finally:
        for owner, name, wide in before:
            setattr(owner, name, wide)


def attends(layer: nn.Module) -> bool:
    """Whether a part of the layer is called attention."""
    return any("attention" in type(m).__name__.lower() or "attn" in type(m).__name__.lower() for m in layer.modules())


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: the longest list of modules that is in no other list (as experts are)."""
    return max(_outer_lists(decoder), key=len)


def _outer_lists(decoder: nn.Module) -> list[nn.ModuleList]:
    lists: dict[str, nn.ModuleList] = {}
    for name, module in text_decoder(decoder).named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{o}.") for o in lists):
            lists[name] = module
    return list(lists.values())


def token_table(model: PreTrainedModel) -> Tensor:
    """(V, D) of the input embeddings."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table


@dataclass(frozen=True)
class LayerCall:
    """What one decoder layer was called with."""

    number: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def looks_ahead(self, row_length: int, threshold: float) -> bool:
        """Whether the layer's output at row 0's earlier tokens changes with its input at the row's last token.

        Row 0 stands at the same place in a packed row and in a padded block. ``threshold`` is relative. The first
        token alone would not do: a sliding window may be shorter than the row.

        The layer is called by itself, so that what earlier layers mixed in does not hide a causal one.
        """
        states: Tensor = self.args[0] if self.args else self.kwargs[_STATES]
        shared = self._borrowed()
        before = self._earlier_output(states, shared, row_length)
        if shared:
            shared = {
                kind: (_disturbed(k, _row_of_heads, row_length), _disturbed(v, _row_of_heads, row_length))
                for kind, (k, v) in shared.items()
            }
        else:
            states = _disturbed(states, _row, row_length)
        after = self._earlier_output(states, shared, row_length)
        return bool((after - before).abs().max() > threshold * before.abs().max())

    def _borrowed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, H, L, head_dim) keys and values by kind of layer, if this layer takes an earlier one's (Gemma 3n, 4)."""
        borrows = any(getattr(module, "is_kv_shared_layer", False) for module in self.module.modules())
        return dict(self.kwargs["shared_kv_states"]) if borrows else {}

    def _earlier_output(self, states: Tensor, shared: dict[str, Any], row_length: int) -> Tensor:
        kwargs = {**self.kwargs, **({"shared_kv_states": shared} if shared else {})}
        out = self.module(states, *self.args[1:], **kwargs) if self.args else self.module(**{**kwargs, _STATES: states})
        return _row(out[0] if isinstance(out, tuple | list) else out, row_length)[: row_length - 1].double()


def _row(states: Tensor, row_length: int) -> Tensor:
    """(L, ...), row 0 of (B, L, ...), or of (S, B, L, D) where several streams stand in front as in Gemma 3n."""
    streams = states.dim() == 4 and states.shape[1] < row_length
    return states[:, 0].movedim(1, 0) if streams else states[0]


def _row_of_heads(states: Tensor, row_length: int) -> Tensor:
    """(L, H, head_dim), row 0 of keys or values (B, H, L, head_dim)."""
    return states[0].movedim(1, 0)


def _disturbed(states: Tensor, row: Callable[[Tensor, int], Tensor], row_length: int) -> Tensor:
    """A copy in which the last token of row 0 is another."""
    changed = states.clone()
    last = row(changed, row_length)[row_length - 1]
    last.copy_(last.flip(-1) * 3 + 1)
    return changed


class LayerInputs:
    """Records the arguments of every decoder layer while open."""

    def __init__(self, decoder: nn.Module) -> None:
        stacks = [stack for stack in _outer_lists(decoder) if any(map(attends, stack))] or [decoder_layers(decoder)]
        self.layers = [layer for stack in stacks for layer in stack]
        self.seen: list[LayerCall] = []

    def __enter__(self) -> LayerInputs:
        def record(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen.append(LayerCall(number, module, args, dict(kwargs)))

        self.handles = [
            layer.register_forward_pre_hook(partial(record, number), with_kwargs=True)
            for number, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
