"""The ways to run a decoder with or without its causal mask. Whether one obeys: :mod:`ullme.models.attention.probe`.

What a call asks for travels with its arguments, never with a module's state, so that gradient checkpointing recomputes
what was computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ullme.models.attention.packed_rows import PackedRows, real_lengths
from ullme.models.attention.packing import ROWS_KEYWORD, no_mask


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
    """All real tokens as one row; see :mod:`ullme.models.attention.packing`."""
    rows = PackedRows(real_lengths(attention_mask), input_ids.device)
    return Hidden(run_rows(decoder, input_ids[attention_mask.bool()], rows, causal), rows.lengths)


def run_rows(decoder: nn.Module, tokens: Tensor, rows: PackedRows, causal: bool) -> Tensor:
    """(T, D) last hidden states of T tokens that are already packed."""
    out = text_decoder(decoder)(
        input_ids=tokens[None],
        attention_mask=no_mask(tokens.device),
        position_ids=rows.position_ids,
        is_causal=causal,
        use_cache=False,
        **{ROWS_KEYWORD: rows},
    )
    return out.last_hidden_state[0]


def run_padded(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool) -> Hidden:
    """A padded block with the forward keyword ``is_causal``, for the decoders that take one."""
    takes = _takes(type(text_decoder(decoder)).forward, "is_causal")
    keywords: dict[str, Any] = {"is_causal": causal} if takes else {}
    return _run_block(decoder, input_ids, attention_mask, **keywords)


def run_flags(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool) -> Hidden:
    """A padded block while ``is_causal`` stands in all configs and modules, for families that look for it there only.

    transformers' mask functions read the configs, so every layer is handed a mask as it should be. A layer without a
    mask would look at its own flag, which is back at its old value when checkpointing recomputes the layer; so a block
    of equally long rows gets one more row, of one token, because of which no mask is left out.

    Raises:
        NotImplementedError: flash attention, which takes flags where others take a mask.
    """
    decoder = text_decoder(decoder)
    if "flash" in (getattr(decoder.config, "_attn_implementation", None) or ""):
        raise NotImplementedError("flash attention has no mask; take attn_implementation: sdpa or eager")
    lengths = set(real_lengths(attention_mask))
    if full := len(lengths) == 1 and lengths != {1}:
        input_ids = torch.cat([input_ids, input_ids[:1]])
        first_only = torch.arange(attention_mask.shape[1], device=attention_mask.device)[None] == 0
        attention_mask = torch.cat([attention_mask, first_only.to(attention_mask)])
    _mirror_buffers(decoder)
    with _flags(decoder, causal):
        hidden = _run_block(decoder, input_ids, attention_mask)
    return Hidden(hidden.flat[:-1], hidden.lengths[:-1]) if full else hidden


@contextmanager
def _flags(decoder: nn.Module, causal: bool) -> Iterator[None]:
    """``is_causal`` in every config and every module that has one, for as long as this is open."""
    owners: dict[int, Any] = {}
    for module in decoder.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            owners[id(module)] = module
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            owners[id(config)] = config
    before = [(owner, vars(owner).get("is_causal")) for owner in owners.values()]
    try:
        for owner, _ in before:
            owner.is_causal = causal
        yield
    finally:
        for owner, value in before:
            if value is None:
                del owner.is_causal
            else:
                owner.is_causal = value


def _mirror_buffers(decoder: nn.Module) -> None:
    """Let layers that keep a triangle of their own (GPT-Neo) look both ways; the mask they add to it keeps the order.

    A local layer's band of ``window`` tokens becomes one of as many to either side. The probe makes sure that causal
    results stay what they were.
    """
    for module in decoder.modules():
        triangle = getattr(module, "bias", None)
        if isinstance(triangle, Tensor) and triangle.dtype == torch.bool and triangle.dim() == 4:
            mirrored = vars(module).setdefault("ullme_mirrored", False)
            if not mirrored:
                module.bias, vars(module)["ullme_mirrored"] = triangle | triangle.transpose(-1, -2), True


def run_mask4d(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool) -> Hidden:
    """A padded block with a ready-made mask, for families that ignore the keyword but take a 4D mask as it is.

    Where layers are of several kinds, there is one mask for each kind.
    """
    own: Any = text_decoder(decoder).config
    config = own.get_text_config()
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if kind.endswith("_attention")}

    def masks(mask: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        if kinds <= {"full_attention"}:
            return _mask4d(mask, dtype, "full_attention", config, causal)
        return {kind: _mask4d(mask, dtype, kind, config, causal) for kind in kinds}

    return _run_block(decoder, input_ids, attention_mask, masks)


def _mask4d(mask: Tensor, dtype: torch.dtype, kind: str, config: Any, causal: bool) -> Tensor:
    """(R, 1, L, L), 0 where a token looks, else the smallest number; ``mask`` is (R, L).

    A window of w tokens becomes w to either side; a chunk is seen whole.

    Raises:
        NotImplementedError: a kind of layer that is not known here.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    distance = place[:, None] - place
    near = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if kind == "sliding_attention":
        near &= distance < config.sliding_window if causal else distance.abs() <= config.sliding_window
    elif kind == "chunked_attention":
        chunk = place // config.attention_chunk_size
        near &= chunk[:, None] == chunk
    elif kind != "full_attention":
        raise NotImplementedError(f"no mask is known for layers of the kind {kind}")
    # A padded token sees itself, so that no row of the softmax is empty.
    seen = near & mask.bool()[:, None, None, :] | (distance == 0)
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)


def text_decoder(decoder: nn.Module) -> nn.Module:
    """The part of a model that turns text into hidden states.

    It is the language model of one that reads images too, and what stands under the head where transformers'
    ``base_model`` is the whole model.
    """
    inner = getattr(decoder, "language_model", None)
    if inner is None and hasattr(decoder, "lm_head"):
        inner = getattr(decoder, "model", None)
    return inner if isinstance(inner, nn.Module) else decoder


def _run_block(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    make_mask: Callable[[Tensor, torch.dtype], Tensor | dict[str, Tensor]] = lambda mask, dtype: mask,
    **keywords: Any,
) -> Hidden:
    """Rows are pushed to the left first, so that a row's positions start at 0 wherever its padding stood."""
    decoder = text_decoder(decoder)
    lengths = torch.tensor(real_lengths(attention_mask), device=input_ids.device)
    real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    ids = torch.zeros_like(input_ids).masked_scatter(real, input_ids[attention_mask.bool()])
    width = int(lengths.max())
    real, ids = real[:, :width], ids[:, :width]
    parameter = next(decoder.parameters())
    out = decoder(
        input_ids=ids,
        attention_mask=make_mask(real.long(), parameter.dtype),
        **keywords,
        **quiet(type(decoder).forward),
    )
    return Hidden(out.last_hidden_state[real], lengths)


@cache
def _takes(forward: Callable[..., Any], keyword: str) -> bool:
    """Whether a forward has this parameter or passes on whatever it does not know."""
    parameters = inspect.signature(forward).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@cache
def quiet(forward: Callable[..., Any]) -> dict[str, bool]:
    """No key-value cache, for the decoders that have one (others would pass the keyword on to their layers)."""
    return {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}


PATHS: dict[str, Callable[[nn.Module, Tensor, Tensor, bool], Hidden]] = {
    "packed": run_packed,
    "padded": run_padded,
    "flags": run_flags,
    "mask4d": run_mask4d,
}
