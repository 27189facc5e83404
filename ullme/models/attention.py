"""The probe that finds a way to run a decoder that really obeys, on the loaded model, layer by layer.

Nothing in transformers promises that a decoder obeys ``is_causal=False``: some families swallow the keyword and stay
causal without a word. So no path is trusted: each is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ullme.models import packing
from ullme.models.paths import (
    PATHS,
    Hidden,
    quiet,
    run_flags,
    run_mask4d,
    run_packed,
    run_padded,
    run_rows,
    text_decoder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "PATHS",
    "Hidden",
    "choose_path",
    "decoder_layers",
    "packing",
    "run_flags",
    "run_mask4d",
    "run_packed",
    "run_padded",
    "run_rows",
    "text_decoder",
]

_STATES = "hidden_states"

logger = logging.getLogger(__name__)

# What config.layer_types calls layers without attention; any other kind has to obey.
_BLIND_LAYERS = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "moe", "mlp"}

_STATES = "hidden_states"

logger = logging.getLogger(__name__)

# What config.layer_types calls layers with attention; other kinds (linear_attention, conv, mamba ...) are recurrent.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Finding:
    """What the probe found out about one path.

    Args:
        failure: why the path cannot be used, or None.
        blind: layers that stay causal because they are recurrent or convolutional, not attention.
    """

    failure: str | None
    blind: tuple[int, ...] = ()


@torch.no_grad()
def choose_path(model: PreTrainedModel, causal: bool, wanted: str = "auto") -> str:
    """The first of packed, padded, flags and mask4d that passes the probe on this very model.

    Args:
        model: the causal LM, before or after an adapter was put in.
        causal: the attention that embedding shall have.
        wanted: ``auto``, or the one path to try.

    Returns:
        The path's name. Packing is installed if, and only if, it is the one.

    Raises:
        ValueError: no path passes; names the family and the layers.
    """
    training = model.training
    model.eval()
    failures = []
    try:
        for name in PATHS if wanted == "auto" else [wanted]:
            finding = _try_path(model, name, causal)
            if finding.failure is None:
                if finding.blind:
                    logger.warning(
                        "%s is a hybrid: layers %s are recurrent or convolutional and stay causal; "
                        "only its attention layers became bidirectional",
                        model.config.model_type,
                        list(finding.blind),
                    )
                return name
            failures.append(f"{name}: {finding.failure}")
    finally:
        model.train(training)
    kind = "causal" if causal else "bidirectional"
    raise ValueError(
        f"the {model.config.model_type!r} backbone cannot be run with {kind} attention here "
        f"({'; '.join(failures)}). "
        + ("Take another backbone." if causal else "Take another backbone, or attention: causal.")
    )


def _try_path(model: PreTrainedModel, name: str, causal: bool) -> Finding:
    """Probe one path; leave packing installed only if it passed."""
    try:
        plain = _plain_forward(model)
        if name == "packed":
            packing.install(model)
        finding = _probe(model, name, causal, plain)
    except Exception as error:  # whatever a family does with an argument it does not know, the path is not for it
        finding = Finding(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
    if name == "packed" and finding.failure is not None:
        packing.uninstall(model)
    return finding


def _block(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """(2, 12) token ids of two rows, 12 and 7 tokens long, and their mask."""
    table = model.get_input_embeddings().weight
    ids = (torch.arange(24, device=table.device).view(2, 12) * 7 + 11) % table.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


def _plain_forward(model: PreTrainedModel) -> Tensor:
    """(12, D) of the first row as transformers runs it, before anything is done to the model."""
    ids, mask = _block(model)
    decoder = text_decoder(model.base_model)
    out = decoder(input_ids=ids[:1], attention_mask=mask[:1], **quiet(type(decoder)))
    return out.last_hidden_state[0]


def _probe(model: PreTrainedModel, name: str, causal: bool, plain: Tensor) -> Finding:
    """Two rows of different lengths: alone = together, every layer looks where it should, causal = transformers'."""
    decoder, run = model.base_model, PATHS[name]
    ids, mask = _block(model)
    device, vocabulary = ids.device, model.get_input_embeddings().weight.shape[0]
    half = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if half else next(decoder.parameters()).dtype
    tolerance = 50 * torch.finfo(dtype).eps

    def far(a: Tensor, b: Tensor) -> bool:
        difference = (a.double() - b.double()).abs().max().item()
        return not difference <= tolerance * max(1.0, a.double().abs().max().item())

    with _LayerInputs(decoder) as layers:
        together = run(decoder, ids, mask, causal).flat
    alone = torch.cat(
        [run(decoder, ids[:1], mask[:1], causal).flat, run(decoder, ids[1:, :7], mask[1:, :7], causal).flat]
    )
    if far(together, alone):
        return Finding("a row's result depends on the other rows or on padding")
    other = ids.clone()
    other[1] = (other[1] + vocabulary // 2) % vocabulary
    before, after = together[:12].double(), run(decoder, other, mask, causal).flat[:12].double()
    if (
        after - before
    ).abs().max() > 1e-3 * before.abs().max():  # sharp in half precision too: nothing was rounded anew
        return Finding("a row's result depends on the other rows")
    causal_run = together if causal else run(decoder, ids, mask, True).flat
    if far(causal_run[: len(plain)], plain):
        return Finding("its causal result differs from the plain forward's")
    # Rounding may move a causal layer's output a little (experts see other groups); a look ahead moves it a lot.
    threshold = min(tolerance, 1e-2) if causal else 1e-6
    wrong = {call.number: call for call in layers.seen if call.looks_ahead(12, threshold) == causal}
    blind = [n for n, call in wrong.items() if not causal and not _has_attention(model, call, len(layers.layers))]
    if stubborn := sorted(set(wrong) - set(blind)):
        state = "look ahead" if causal else "stay causal"
        return Finding(f"layers {_spans(stubborn)} of {len(layers.layers)} {state}")
    if len(blind) == len({call.number for call in layers.seen}):
        return Finding("no layer has attention")
    return Finding(None, tuple(sorted(blind)))


def _has_attention(model: PreTrainedModel, call: _LayerCall, number_of_layers: int) -> bool:
    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types and len(types) == number_of_layers:
        return types[call.number] not in _BLIND_LAYERS
    return _attends(call.module)


def _attends(layer: nn.Module) -> bool:
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


@dataclass(frozen=True)
class _LayerCall:
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
            shared = {kind: tuple(_disturbed(x, _row_of_heads, row_length) for x in kv) for kind, kv in shared.items()}
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


class _LayerInputs:
    """Records the arguments of every decoder layer while open."""

    def __init__(self, decoder: nn.Module) -> None:
        stacks = [stack for stack in _outer_lists(decoder) if any(map(_attends, stack))] or [decoder_layers(decoder)]
        self.layers = [layer for stack in stacks for layer in stack]
        self.seen: list[_LayerCall] = []

    def __enter__(self) -> _LayerInputs:
        def record(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen.append(_LayerCall(number, module, args, dict(kwargs)))

        self.handles = [
            layer.register_forward_pre_hook(partial(record, number), with_kwargs=True)
            for number, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
