"""The ways to run a decoder without its causal mask, and the probe that finds one that really works.

Nothing in transformers promises that a decoder obeys ``is_causal=False``: some families swallow the keyword and stay
causal without a word. So no path is trusted: each is tried on the loaded model, layer by layer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ullme.models import packing
from ullme.models.packing import ROWS_KEYWORD, no_mask
from ullme.models.rows import PackedRows, real_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What config.layer_types calls layers with attention; other kinds (linear_attention, conv, mamba ...) are recurrent.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Hidden:
    """Last hidden states of the real tokens.

    Args:
        flat: (T, D), row after row.
        lengths: (R,) tokens of each row.
    """

    flat: Tensor
    lengths: Tensor


def run_packed(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool) -> Hidden:
    """All real tokens as one row; see :mod:`ullme.models.packing`."""
    rows = PackedRows(real_lengths(attention_mask), input_ids.device)
    return Hidden(run_rows(decoder, input_ids[attention_mask.bool()], rows, causal), rows.lengths)


def run_rows(decoder: nn.Module, tokens: Tensor, rows: PackedRows, causal: bool) -> Tensor:
    """(T, D) last hidden states of T tokens that are already packed."""
    out = decoder(
        input_ids=tokens[None],
        attention_mask=no_mask(tokens.device),
        position_ids=rows.position_ids,
        is_causal=causal,
        use_cache=False,
        **{ROWS_KEYWORD: rows},
    )
    return out.last_hidden_state[0]


def run_padded(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool) -> Hidden:
    """A padded block with the forward keyword ``is_causal``."""
    return _run_block(decoder, input_ids, attention_mask, lambda mask, dtype: mask, is_causal=causal)


def run_mask4d(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool) -> Hidden:
    """A padded block with a ready-made mask, for families that ignore the keyword but take a 4D mask as it is."""

    def full(mask: Tensor, dtype: torch.dtype) -> Tensor:
        seen = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        if causal:
            seen = seen & seen.new_ones(mask.shape[1], mask.shape[1]).tril()
        return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)

    return _run_block(decoder, input_ids, attention_mask, full)


def _run_block(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    make_mask: Callable[[Tensor, torch.dtype], Tensor],
    **keywords: Any,
) -> Hidden:
    """Rows are pushed to the left first, so that a row's positions start at 0 wherever its padding stood."""
    lengths = torch.tensor(real_lengths(attention_mask), device=input_ids.device)
    real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    ids = torch.zeros_like(input_ids).masked_scatter(real, input_ids[attention_mask.bool()])
    width = int(lengths.max())
    real, ids = real[:, :width], ids[:, :width]
    parameter = next(decoder.parameters())
    out = decoder(
        input_ids=ids, attention_mask=make_mask(real.long(), parameter.dtype), **keywords, **_quiet(type(decoder))
    )
    return Hidden(out.last_hidden_state[real], lengths)


@cache
def _quiet(decoder_class: type[nn.Module]) -> dict[str, bool]:
    """No key-value cache, for the decoders that have one (others would pass the keyword on to their layers)."""
    return {"use_cache": False} if "use_cache" in inspect.signature(decoder_class.forward).parameters else {}


PATHS: dict[str, Callable[[nn.Module, Tensor, Tensor, bool], Hidden]] = {
    "packed": run_packed,
    "padded": run_padded,
    "mask4d": run_mask4d,
}


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
    """The first of packed, padded and mask4d that passes the probe on this very model.

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
        if name == "packed":
            packing.install(model)
        finding = _probe(model, name, causal)
    except Exception as error:  # whatever a family does with an argument it does not know, the path is not for it
        finding = Finding(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
    if name == "packed" and finding.failure is not None:
        packing.uninstall(model)
    return finding


def _probe(model: PreTrainedModel, name: str, causal: bool) -> Finding:
    """Two rows of different lengths: alone = together, every layer looks where it should, causal = transformers'."""
    decoder, run = model.base_model, PATHS[name]
    device = next(decoder.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(24, device=device).view(2, 12) * 7 + 11) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
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
    plain = decoder(input_ids=ids[:1], attention_mask=mask[:1]).last_hidden_state[0]
    if far(causal_run[: len(plain)], plain):
        return Finding("its causal result differs from the plain forward's")
    # Rounding may move a causal layer's output a little (experts see other groups); a look ahead moves it a lot.
    threshold = min(tolerance, 1e-2) if causal else 1e-6
    reacts = [layer.looks_ahead(12, threshold) for layer in layers.seen]
    wrong = [n for n, reaction in enumerate(reacts) if reaction == causal]
    blind = [n for n in wrong if not causal and not _has_attention(model, n)]
    if stubborn := [n for n in wrong if n not in blind]:
        state = "look ahead" if causal else "stay causal"
        return Finding(f"layers {_spans(stubborn)} of {len(reacts)} {state}")
    if blind and len(blind) == len(reacts):
        return Finding("no layer has attention")
    return Finding(None, tuple(blind))


def _has_attention(model: PreTrainedModel, layer: int) -> bool:
    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types:
        return types[layer] in _ATTENTION_LAYERS
    module = decoder_layers(model.base_model)[layer]
    return any("attention" in type(m).__name__.lower() or "attn" in type(m).__name__.lower() for m in module.modules())


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: the longest list of modules."""
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


@dataclass(frozen=True)
class _LayerCall:
    """What one decoder layer was called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def looks_ahead(self, row_length: int, threshold: float) -> bool:
        """Whether the layer's output at row 0's earlier tokens changes with its input at the row's last token.

        Row 0 stands at the same place in a packed row and in a padded block. ``threshold`` is relative. The first
        token alone would not do: a sliding window may be shorter than the row.

        The layer is called by itself, so that what earlier layers mixed in does not hide a causal one.
        """
        positional = bool(self.args)
        states: Tensor = self.args[0] if positional else self.kwargs["hidden_states"]
        changed = states.clone()
        changed[0, row_length - 1] = states[0, row_length - 1].flip(-1) * 3 + 1

        def earlier_output(x: Tensor) -> Tensor:
            args = (x, *self.args[1:]) if positional else ()
            kwargs = self.kwargs if positional else {**self.kwargs, "hidden_states": x}
            out = self.module(*args, **kwargs)
            return (out[0] if isinstance(out, tuple) else out)[0, : row_length - 1].double()

        before, after = earlier_output(states), earlier_output(changed)
        return bool((after - before).abs().max() > threshold * before.abs().max())


class _LayerInputs:
    """Records the arguments of every decoder layer while open."""

    def __init__(self, decoder: nn.Module) -> None:
        self.layers = decoder_layers(decoder)
        self.seen: list[_LayerCall] = []

    def __enter__(self) -> _LayerInputs:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen.append(_LayerCall(module, args, dict(kwargs)))

        self.handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
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
