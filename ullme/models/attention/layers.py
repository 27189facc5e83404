"""Find a decoder's layers, record their calls, and test whether a layer attends to later tokens."""

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

_HIDDEN_STATES = "hidden_states"

# The attributes under which model families store the size of a sliding window or attention chunk, in tokens.
_WINDOW_ATTRIBUTES = (
    *("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention"),
    "attention_chunk_size",
)


def rounding(dtype: torch.dtype) -> float:
    """Tolerance for comparing two computations of the same hidden states, relative to the largest value.

    Kernels sum in a different order for other numbers of rows, and the error grows over layers: up to 2e-5 was
    measured in float32 for four layers with large weights. In float64 too, many families compute softmax, norms,
    rotations or ALiBi in float32. The errors that the probe looks for (leaks between rows, attention to padding or to
    later tokens) are far larger.
    """
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return (50 if eps > 1e-4 else 1000) * eps


@contextmanager
def short_windows(decoder: nn.Module, size: int = 4) -> Iterator[None]:
    """Reduce sliding windows and attention chunks to ``size`` tokens inside the context.

    A path that ignores windows is correct on rows shorter than the window. With small windows, the probe's short rows
    expose it.
    """
    owners: dict[int, Any] = {}
    for module in decoder.modules():
        owners[id(module)] = module
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            owners[id(config)] = config
    before = [
        (owner, name, value)
        for owner in owners.values()
        for name in _WINDOW_ATTRIBUTES
        if type(value := vars(owner).get(name)) is int and value > size
    ]
    try:
        for owner, name, _ in before:
            setattr(owner, name, size)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def contains_attention(layer: nn.Module) -> bool:
    """Whether the class name of the layer or of one of its submodules says attention."""
    return any("attention" in type(m).__name__.lower() or "attn" in type(m).__name__.lower() for m in layer.modules())


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder layers: the longest ``nn.ModuleList`` that is not nested in another one (as lists of experts are)."""
    return max(_top_level_module_lists(decoder), key=len)


def _top_level_module_lists(decoder: nn.Module) -> list[nn.ModuleList]:
    """The non-empty module lists of the text decoder that are not nested in another one."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in text_decoder(decoder).named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists[name] = module
    return list(lists.values())


def token_table(model: PreTrainedModel) -> Tensor:
    """(V, D) weight of the input embedding."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table


@dataclass(frozen=True)
class LayerCall:
    """One recorded call of a decoder layer.

    Args:
        index: of the layer, from 0.
        module: the layer.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    index: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def looks_ahead(self, row_length: int, threshold: float) -> bool:
        """Whether changing row 0's last token changes the layer's output at the row's earlier tokens.

        The layer is called again by itself, so that bidirectional layers below do not hide a causal one. All earlier
        tokens are compared, not the first alone, since a sliding window may be shorter than the row.

        Args:
            row_length: tokens of row 0, which starts at index 0 both in a packed row and in a padded block.
            threshold: least change that counts, relative to the largest output.
        """
        states: Tensor = self.args[0] if self.args else self.kwargs[_HIDDEN_STATES]
        shared: dict[str, Any] = self._shared_keys_values()
        before = self._output_before_last_token(states, shared, row_length)
        if shared:
            shared = {
                layer_type: tuple(_change_last_token(x, _first_row_of_heads, row_length) for x in keys_values)
                for layer_type, keys_values in shared.items()
            }
        else:
            states = _change_last_token(states, _first_row, row_length)
        after = self._output_before_last_token(states, shared, row_length)
        return bool((after - before).abs().max() > threshold * before.abs().max())

    def _shared_keys_values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, H, L, head_dim) keys and values by layer type, if this layer reuses an earlier one's (Gemma 3n, 4)."""
        shares = any(getattr(module, "is_kv_shared_layer", False) for module in self.module.modules())
        return dict(self.kwargs["shared_kv_states"]) if shares else {}

    def _output_before_last_token(self, states: Tensor, shared: dict[str, Any], row_length: int) -> Tensor:
        """(row_length - 1, ...) output of row 0 in float64."""
        kwargs = {**self.kwargs, **({"shared_kv_states": shared} if shared else {})}
        if self.args:
            out = self.module(states, *self.args[1:], **kwargs)
        else:
            out = self.module(**{**kwargs, _HIDDEN_STATES: states})
        return _first_row(out[0] if isinstance(out, tuple | list) else out, row_length)[: row_length - 1].double()


def _first_row(states: Tensor, row_length: int) -> Tensor:
    """(L, ...): row 0 of (B, L, ...), or of (S, B, L, D) with S residual streams (Gemma 3n)."""
    streams = states.dim() == 4 and states.shape[1] < row_length
    return states[:, 0].movedim(1, 0) if streams else states[0]


def _first_row_of_heads(states: Tensor, row_length: int) -> Tensor:
    """(L, H, head_dim): row 0 of keys or values (B, H, L, head_dim)."""
    return states[0].movedim(1, 0)


def _change_last_token(states: Tensor, first_row: Callable[[Tensor, int], Tensor], row_length: int) -> Tensor:
    """A copy of ``states`` with other values at the last token of row 0."""
    changed = states.clone()
    last = first_row(changed, row_length)[row_length - 1]
    last.copy_(last.flip(-1) * 3 + 1)
    return changed


class LayerCallRecorder:
    """Context manager that records every call of a decoder layer in :attr:`calls`."""

    def __init__(self, decoder: nn.Module) -> None:
        stacks = [stack for stack in _top_level_module_lists(decoder) if any(map(contains_attention, stack))]
        self.layers = [layer for stack in stacks or [decoder_layers(decoder)] for layer in stack]
        self.calls: list[LayerCall] = []

    def __enter__(self) -> LayerCallRecorder:
        def record(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append(LayerCall(index, module, args, dict(kwargs)))

        self.handles = [
            layer.register_forward_pre_hook(partial(record, index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
