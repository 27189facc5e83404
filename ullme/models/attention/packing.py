"""The packed forward: the real tokens of all rows go through the LLM as one row; only attention treats rows apart.

Norms, projections and MLPs act on each token by itself, so nothing is computed on padding. Attention gets the row
lengths through a forward keyword (:data:`ROWS_KEYWORD`) and runs within each row: on CUDA with
``torch.nn.attention.varlen``, on a CPU row by row (:mod:`ullme.models.attention.plain_rows`), and what these do not
have (other heads, windows, softcap, dropout, shared prompts) in groups of rows of similar length. Position ids restart
in every row.

torch.compile traces the kernel, and all else as one operation (:mod:`ullme.models.attention.traced`).

This is an attention function registered with transformers as ``ullme_<base>``; calls without the keyword go to the
``<base>`` function. The choice depends on the call's arguments, never on a module's state, so gradient checkpointing
recomputes what was computed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ullme.models.attention import plain_rows, traced
from ullme.models.attention.packed_rows import Group, PackedRows
from ullme.models.attention.reorder import from_groups, to_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_KEYWORD = "ullme_rows"
PREFIX = "ullme_"
# The flash kernel's widest head; a head must also be a multiple of 8 wide.
_MAX_HEAD_DIM = 256


def packed_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for transformers: within packed rows if :data:`ROWS_KEYWORD` is given, else ``base``.

    Args:
        base: name of transformers' attention function for calls without the keyword.
        module: the attention module that calls.
        query: (1, H, T, head_dim), packed.
        key: (1, H_kv, T, head_dim), packed.
        value: (1, H_kv, T, head_dim), packed.
        attention_mask: not used with packed rows.
        scaling: of the scores; None is head_dim ** -0.5.
        dropout: on attention weights.
        **kwargs: transformers' other arguments: is_causal, sliding_window, softcap ...

    Returns:
        (1, T, H, head_dim) output and, in place of attention weights, None.

    Raises:
        NotImplementedError: attention sinks or position biases, which packed rows do not support.
    """
    rows: PackedRows | None = kwargs.pop(ROWS_KEYWORD, None)
    if rows is None:
        function = _base_function(base, module)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if unsupported := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"packed attention does not support {unsupported}")
    causal = bool(kwargs["is_causal"])
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    compiling = torch.compiler.is_compiling()
    if window is not None and not compiling and window >= rows.max_keys:  # a graph would hold for one side of this only
        window = None
    if _on_cuda(query) and not dropout and softcap is None:
        query, key, value = _cast_for_autocast(query, key, value)
        if _kernel_takes(query, value):
            return _varlen_attention(query, key, value, rows, scaling, causal, window), None
    if not compiling:
        return attention_without_varlen(query, key, value, rows, scaling, causal, window, softcap, dropout), None
    query, key, value = _cast_for_autocast(query, key, value)  # which traced operations do not do themselves
    options = (rows.layout, scaling, causal, window or 0, softcap or 0.0)
    seed = traced.new_seed() if dropout else None
    return traced.packed_attention(query, key, value, *options, dropout, seed), None


def _cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype: a norm on queries or keys leaves these in float32, and attention needs one dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _on_cuda(query: Tensor) -> bool:
    return query.is_cuda


def _kernel_takes(query: Tensor, value: Tensor) -> bool:
    """Whether the flash kernel has this dtype and head_dim. It has one width for queries and values (MLA has two)."""
    head_dim = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and head_dim <= _MAX_HEAD_DIM and head_dim % 8 == 0 and value.shape[-1] == head_dim


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, scale: float | None, causal: bool, window: int | None
) -> Tensor:
    """(1, T, H, head_dim) from the flash kernel for rows of different lengths (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    left, right = (-1, 0) if causal else (-1, -1)
    if window is not None:  # as in transformers: causal i - j < window, bidirectional |i - j| <= window
        left, right = (window - 1, 0) if causal else (window, window)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    extra: dict[str, Any] = {}
    # The kernel lets several query heads share a key head; torch up to 2.11 has no parameter for it and no check.
    if k.shape[1] != q.shape[1] and _varlen_has_parameter("enable_gqa"):
        extra["enable_gqa"] = True
    if _varlen_has_parameter("window_size"):
        extra["window_size"] = (left, right)
    elif (left, right) in ((-1, 0), (-1, -1)):
        extra["is_causal"] = causal
    else:
        raise NotImplementedError("this torch's varlen_attn has no sliding window; install a newer torch")
    key_index, key_cu_seqlens = rows.varlen_keys
    if key_index is not None:  # causal masks are aligned at the end, so a row's first token sees its parent and itself
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)
    attend: Callable[..., Any] = varlen_attn  # its signature differs between versions of torch
    return attend(q, k, v, rows.cu_seqlens, key_cu_seqlens, rows.max_length, rows.max_keys, scale=scale, **extra)[None]


@torch.compiler.assume_constant_result
@cache
def _varlen_has_parameter(parameter: str) -> bool:
    """Whether this version of torch has the parameter in ``varlen_attn``."""
    from torch.nn.attention.varlen import varlen_attn

    return parameter in inspect.signature(varlen_attn).parameters


def attention_without_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PackedRows,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """(1, T, H, head_dim): on a CPU, plain attention reads the rows where they lie; all else runs in groups."""
    if window is None and softcap is None and not dropout and plain_rows.takes(query, value, rows):
        query, key, value = _cast_for_autocast(query, key, value)
        return plain_rows.attention(query, key, value, rows, scale, causal)
    return _grouped_attention(query, key, value, rows, scale, causal, window, softcap, dropout)


def _grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: PackedRows,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """(1, T, H, head_dim) from one padded attention call for each group of rows of similar length."""
    repeats = q.shape[1] // k.shape[1]
    attend = partial(_softcapped, softcap=softcap) if softcap is not None else scaled_dot_product_attention
    grouping = rows.grouping
    indices = [group.index for group in grouping.groups]
    key_indices = [group.index if group.keys is None else group.keys for group in grouping.groups]
    # a prompt that several rows continue is copied to each of them, and its gradient is a sum
    shared = any(group.keys is not None for group in grouping.groups)
    key_inverse = None if shared else grouping.ungroup_index
    grouped = zip(
        grouping.groups,
        _gather_groups(q, grouping.positions, grouping.ungroup_index, indices),
        *(_gather_groups(x, grouping.key_positions, key_inverse, key_indices) for x in (k, v)),
        strict=True,
    )
    outputs = []
    for n, (group, qg, *keys_values) in enumerate(grouped):
        kg, vg = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in keys_values)
        # Padding is on the right, where causal attention does not look, so a causal group needs no mask.
        plain_causal = causal and window is None and softcap is None and group.keys is None
        mask = None if plain_causal else _cached_group_mask(rows, n, causal, window, None if softcap else q.dtype)
        out = attend(qg, kg, vg, attn_mask=mask, dropout_p=dropout, is_causal=plain_causal, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return from_groups(torch.cat(outputs), grouping.ungroup_index)[None]


def _gather_groups(x: Tensor, positions: Tensor, inverse: Tensor | None, indices: list[Tensor]) -> list[Tensor]:
    """The tokens of each group; the heads of a token are contiguous in memory.

    Args:
        x: (1, H, T, head_dim) packed.
        positions: the concatenated ``indices``.
        inverse: (T,) the place of each token in ``positions``; None if a token may have several.
        indices: (n, l) positions of each group.

    Returns:
        (n, H, l, head_dim) for each group.
    """
    tokens = x[0].transpose(0, 1)
    gathered = tokens.index_select(0, positions) if inverse is None else to_groups(tokens, positions, inverse)
    parts = gathered.split([index.numel() for index in indices])
    return [part.unflatten(0, index.shape).transpose(1, 2) for part, index in zip(parts, indices, strict=True)]


def _cached_group_mask(
    rows: PackedRows, n: int, causal: bool, window: int | None, dtype: torch.dtype | None
) -> Tensor | None:
    """:func:`_group_mask` of the n-th group, computed once for all layers.

    Args:
        dtype: of an additive mask (0 and minus infinity), which attention would otherwise make in every call; None
            gives a bool mask.
    """
    key = (n, causal, window, dtype)
    if key not in rows.masks:
        mask = _group_mask(rows.grouping.groups[n], causal, window)
        if mask is not None and dtype is not None:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
        rows.masks[key] = mask
    return rows.masks[key]


def _group_mask(group: Group, causal: bool, window: int | None) -> Tensor | None:
    """(n or 1, 1, l, k) bool, True where a token attends to a key, or None if everywhere."""
    key_mask = group.mask if group.keys is None else group.key_mask
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal or window is not None:
        device, length = group.index.device, group.index.shape[1]
        keys = torch.arange(length if group.keys is None else group.keys.shape[1], device=device)
        query = torch.arange(length, device=device)
        distance = (
            query[:, None] - keys if group.offset is None else group.offset[:, None, None] + query[:, None] - keys
        )
        distance = distance.view(-1, 1, length, len(keys))
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            visible = visible & (distance < window if causal else distance.abs() <= window)
        mask = visible if mask is None else mask & visible
        if group.mask is not None and window is not None:
            # A padding token whose window holds only padding would give NaN; its output is dropped anyway.
            mask = mask | ~group.mask[:, None, :, None]
    return mask


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention with tanh-capped scores (Gemma 2, arXiv 2408.00118, section 2), softmax in float32."""
    assert not is_causal
    scores = (q @ k.transpose(2, 3)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return nn.functional.dropout(weights, p=dropout_p) @ v


def _base_function(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; the eager one is defined in each family's modelling file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    return sys.modules[type(module).__module__].eager_attention_forward


def install(model: PreTrainedModel) -> None:
    """Make a transformers model accept :data:`ROWS_KEYWORD`; calls without the keyword run as before.

    Raises:
        NotImplementedError: the model's attention implementation has no mask function (paged or custom kernels).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    base = model.config._attn_implementation
    if base.startswith(PREFIX):
        return
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise NotImplementedError(f"attn_implementation={base!r} does not support packed rows")
    AttentionInterface.register(PREFIX + base, partial(packed_attention, base))
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.config._attn_implementation = PREFIX + base


def uninstall(model: PreTrainedModel) -> None:
    """Undo :func:`install`."""
    model.config._attn_implementation = model.config._attn_implementation.removeprefix(PREFIX)


def no_mask(device: torch.device) -> Tensor:
    """An empty 4D attention mask: transformers passes 4D masks on unchanged, so no (T, T) mask is built."""
    return torch.empty((1, 1, 0, 0), device=device)
