"""Paths: the ways to run a decoder with bidirectional or causal attention.

Model families differ in which of them work; :mod:`ullme.models.attention.probe` tries them on the loaded model. A path
passes its choice in the arguments of the call, not in a module's state, so that gradient checkpointing recomputes what
was computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ullme.models.attention import rotary
from ullme.models.attention.packed_rows import PackedRows, real_lengths
from ullme.models.attention.packing import ROWS_KEYWORD, no_mask
from ullme.token_rows import HostMasks
from ullme.utils.transfer import to_device


@dataclass(frozen=True)
class Hidden:
    """Last hidden states of the T real tokens of R rows.

    Args:
        flat: (T, D) hidden states, row after row.
        lengths: (R,) tokens of each row.
    """

    flat: Tensor
    lengths: Tensor


def run_packed(
    decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool, host: HostMasks | None = None
) -> Hidden:
    """Run all real tokens as one packed row; see :mod:`ullme.models.attention.packing`.

    Args:
        decoder: in which packing is installed.
        input_ids: (R, L) token ids.
        attention_mask: (R, L), 1 on real tokens and 0 on padding, on either side.
        causal: whether tokens attend to earlier ones only.
        host: the mask on the host; None copies it from the device.
    """
    host = HostMasks.of(attention_mask) if host is None else host
    rows = PackedRows(real_lengths(host), input_ids.device, indices={"real": np.flatnonzero(host.attention)})
    return Hidden(run_rows(decoder, input_ids.take(rows.indices["real"]), rows, causal), rows.lengths)


def run_rows(decoder: nn.Module, tokens: Tensor, rows: PackedRows, causal: bool) -> Tensor:
    """(T, D) last hidden states of T packed tokens with the given layout."""
    decoder = text_decoder(decoder)
    key = rotary.length_key(decoder)
    groups = [] if key is None else rotary.packed_groups(rows.host_lengths, rows.full_lengths, key)
    with rotary.frequencies_by_group(decoder, groups, 1) if groups else nullcontext():
        out = decoder(
            input_ids=tokens[None],
            attention_mask=no_mask(tokens.device),
            position_ids=rows.position_ids,
            is_causal=causal,
            use_cache=False,
            **{ROWS_KEYWORD: rows},
        )
    return out.last_hidden_state[0]


def run_padded(
    decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool, host: HostMasks | None = None
) -> Hidden:
    """Run a padded block, with the forward keyword ``is_causal`` if the decoder accepts it.

    Arguments as for :func:`run_packed`: (R, L) token ids and mask.
    """
    accepts = _accepts_keyword(type(text_decoder(decoder)).forward, "is_causal")
    keywords: dict[str, Any] = {"is_causal": causal} if accepts else {}
    return _run_block(decoder, input_ids, attention_mask, host, **keywords)


def run_flags(
    decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool, host: HostMasks | None = None
) -> Hidden:
    """Run a padded block with ``is_causal`` set on all configs and modules, for families that read it only there.

    transformers' mask functions read the configs and so pass the right mask to every layer. Without a mask, a layer
    would read its own flag, which has its old value again when gradient checkpointing recomputes the layer. As
    transformers omits the mask if all rows have the same length, such a block gets an extra row of one token.
    Arguments as for :func:`run_packed`: (R, L) token ids and mask.

    Raises:
        NotImplementedError: flash attention, which uses flags instead of a mask.
    """
    decoder = text_decoder(decoder)
    if "flash" in (getattr(decoder.config, "_attn_implementation", None) or ""):
        raise NotImplementedError("flash attention takes no mask; set attn_implementation to sdpa or eager")
    host = HostMasks.of(attention_mask) if host is None else host
    lengths = set(real_lengths(host).tolist())
    if extra_row := len(lengths) == 1 and lengths != {1}:  # a block of one-token rows is padded anyway
        input_ids = torch.cat([input_ids, input_ids[:1]])
        first_only = torch.arange(attention_mask.shape[1], device=attention_mask.device)[None] == 0
        attention_mask = torch.cat([attention_mask, first_only.to(attention_mask)])
        host = HostMasks(np.concatenate([host.attention, np.arange(attention_mask.shape[1])[None] == 0]))
    _make_mask_buffers_bidirectional(decoder)
    with _is_causal_flags(decoder, causal):
        hidden = _run_block(decoder, input_ids, attention_mask, host)
    return Hidden(hidden.flat[:-1], hidden.lengths[:-1]) if extra_row else hidden


@contextmanager
def _is_causal_flags(decoder: nn.Module, causal: bool) -> Iterator[None]:
    """Set ``is_causal`` on every config and on every module that has it, inside the context."""
    holders: dict[int, Any] = {}  # by their attributes: several views of a config share them (models/dropout.py)
    for module in decoder.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            holders[id(vars(module))] = module
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            holders[id(vars(config))] = config
    before = [(holder, vars(holder).get("is_causal")) for holder in holders.values()]
    try:
        for holder, _ in before:
            holder.is_causal = causal
        yield
    finally:
        for holder, value in before:
            if value is None:
                del holder.is_causal
            else:
                holder.is_causal = value


def _make_mask_buffers_bidirectional(decoder: nn.Module) -> None:
    """Make the causal mask buffers of layers that have one (GPT-Neo) symmetric, once.

    Causal attention then comes from the attention mask alone, which such layers apply too; the probe checks that causal
    results do not change. A local layer's window of w tokens becomes w tokens on either side.
    """
    for module in decoder.modules():
        mask = getattr(module, "bias", None)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
            continue
        if not vars(module).get("ullme_symmetric_mask", False):
            module.bias, vars(module)["ullme_symmetric_mask"] = mask | mask.transpose(-1, -2), True


def run_mask4d(
    decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, causal: bool, host: HostMasks | None = None
) -> Hidden:
    """Run a padded block with a 4D mask, for families that ignore ``is_causal`` but pass a 4D mask on unchanged.

    If the config has several layer types, the decoder gets one mask for each. Arguments as for :func:`run_packed`:
    (R, L) token ids and mask.
    """
    decoder_config: Any = text_decoder(decoder).config
    config = decoder_config.get_text_config()
    layer_types = {name for name in getattr(config, "layer_types", None) or () if name.endswith("_attention")}

    def masks(mask: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        if layer_types <= {"full_attention"}:
            return _mask4d(mask, dtype, "full_attention", config, causal)
        return {name: _mask4d(mask, dtype, name, config, causal) for name in layer_types}

    return _run_block(decoder, input_ids, attention_mask, host, masks)


def _mask4d(mask: Tensor, dtype: torch.dtype, layer_type: str, config: Any, causal: bool) -> Tensor:
    """(R, 1, L, L) additive mask: 0 where a token attends to another, else the dtype's minimum.

    Without ``causal``, a sliding window of w tokens reaches w tokens to either side, and a chunk is attended to whole.

    Args:
        mask: (R, L), 1 on real tokens.
        dtype: of the result.
        layer_type: as in ``config.layer_types``.
        config: the text model's, with the sizes of windows and chunks.
        causal: whether later tokens are masked.

    Raises:
        NotImplementedError: an unknown layer type.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    distance = position[:, None] - position
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if layer_type == "sliding_attention":
        visible &= distance < config.sliding_window if causal else distance.abs() <= config.sliding_window
    elif layer_type == "chunked_attention":
        chunk = position // config.attention_chunk_size
        visible &= chunk[:, None] == chunk
    elif layer_type != "full_attention":
        raise NotImplementedError(f"no attention mask is known for layers of type {layer_type!r}")
    # A padding token attends to itself, so that no row of the softmax is empty.
    attended = visible & mask.bool()[:, None, None, :] | (distance == 0)
    return torch.zeros(attended.shape, dtype=dtype, device=mask.device).masked_fill(~attended, torch.finfo(dtype).min)


def text_decoder(decoder: nn.Module) -> nn.Module:
    """The part of a model that turns token ids into hidden states.

    That is the language model of a vision-language model, and the model without its LM head where transformers'
    ``base_model`` includes the head.
    """
    inner = getattr(decoder, "language_model", None)
    if inner is None and hasattr(decoder, "lm_head"):
        inner = getattr(decoder, "model", None)
    return inner if isinstance(inner, nn.Module) else decoder


def _run_block(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    host: HostMasks | None,
    make_mask: Callable[[Tensor, torch.dtype], Tensor | dict[str, Tensor]] = lambda mask, dtype: mask,
    **keywords: Any,
) -> Hidden:
    """Run the decoder on right-padded rows: left padding is moved to the right, so that positions start at 0."""
    decoder = text_decoder(decoder)
    host = HostMasks.of(attention_mask) if host is None else host
    lengths = real_lengths(host)
    # At least two columns: MPT makes no mask, and fails, for a block of one.
    block = np.arange(max(2, lengths.max())) < lengths[:, None]
    places = np.flatnonzero(host.attention), np.flatnonzero(block)
    source, target, real, device_lengths = to_device([*places, block, lengths], input_ids.device)
    ids = input_ids.new_zeros(block.size).index_copy(0, target, input_ids.take(source)).view(block.shape)
    parameter = next(decoder.parameters())
    key = rotary.length_key(decoder)
    groups = [] if key is None else rotary.padded_groups(lengths.tolist(), key)
    with rotary.frequencies_by_group(decoder, groups, len(lengths)) if groups else nullcontext():
        out = decoder(
            input_ids=ids,
            attention_mask=make_mask(real.long(), parameter.dtype),
            **keywords,
            **without_cache(type(decoder).forward),
        )
    return Hidden(out.last_hidden_state.flatten(0, 1).index_select(0, target), device_lengths)


@cache
def _accepts_keyword(forward: Callable[..., Any], keyword: str) -> bool:
    """Whether a forward has this parameter, or ``**kwargs``."""
    parameters = inspect.signature(forward).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@cache
def without_cache(forward: Callable[..., Any]) -> dict[str, bool]:
    """``use_cache=False`` for a forward with this parameter; others might pass the keyword on to their layers."""
    return {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}


# (decoder, input_ids (R, L), attention_mask (R, L), causal, the masks on the host if they are known) -> hidden states
PATHS: dict[str, Callable[..., Hidden]] = {
    "packed": run_packed,
    "padded": run_padded,
    "flags": run_flags,
    "mask4d": run_mask4d,
}
