"""Rotary positions that depend on the length of the text (longrope, dynamic NTK): every row gets those of its own.

transformers chooses the frequencies of a whole batch by its longest row, and dynamic NTK also by the longest row of
earlier batches. Then the embedding of a short text changes when a long one is beside it. Here the rotary module runs
once for each group of rows with the same frequencies, and the decoder still runs once (FSDP needs as many forwards on
every rank).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Groups of positions in (B, L), each an index into it: token indices of a packed row, or rows and their width.
Groups = list[tuple[Any, ...]]


def _rope_types(module: nn.Module) -> set[str]:
    kind = getattr(module, "rope_type", None)
    return {value for value in (kind.values() if isinstance(kind, dict) else [kind]) if isinstance(value, str)}


def _depends_on_length(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _configured(decoder: nn.Module) -> bool:
    """Whether the config asks for such positions; checked first since the modules of a decoder are many."""
    config: Any = getattr(decoder, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(_depends_on_length(str(each.get("rope_type", each.get("type", "")))) for each in nested)


def length_dependent(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's rotary modules whose frequencies depend on the length of a row.

    Raises:
        NotImplementedError: the config asks for such positions, and no module is known that computes them once for all
            layers.
    """
    if not _configured(decoder):
        return []
    found = {name: m for name, m in decoder.named_modules() if any(map(_depends_on_length, _rope_types(m)))}
    # a module inside a layer would run again in backward, when layers are recomputed
    if not found or any(part.isdigit() for name in found for part in name.split(".")):
        raise NotImplementedError("its rotary positions depend on the length of the text in a way that is not known")
    return list(found.values())


def _limits(module: nn.Module) -> list[tuple[str, int]]:
    """(kind, tokens up to which the frequencies are the short ones) of a rotary module."""
    types: Any = getattr(module, "rope_type", None)
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    limits = []
    for layer_type, kind in types.items() if isinstance(types, dict) else [(None, types)]:
        own = parameters if layer_type is None else parameters[layer_type]
        if "dynamic" in kind:
            limits.append(("dynamic", int(module.original_max_seq_len)))  # type: ignore[arg-type]
        elif kind == "longrope":
            limits.append(("longrope", int(own["original_max_position_embeddings"])))
    return limits


def length_key(decoder: nn.Module) -> Callable[[int], Hashable] | None:
    """A function from a row's length to a key: rows with equal keys have the same frequencies. None: all rows have."""
    limits = sorted({limit for module in length_dependent(decoder) for limit in _limits(module)})

    def key(length: int) -> Hashable:
        # longrope has two sets of frequencies; dynamic NTK has one for each length beyond the limit
        return tuple(0 if length <= limit else length if kind == "dynamic" else 1 for kind, limit in limits)

    return key if limits else None


def packed_groups(lengths: Sequence[int], full_lengths: Sequence[int], key: Callable[[int], Hashable]) -> Groups:
    """For a packed row of R rows: the token indices of each group.

    Args:
        lengths: tokens of each row.
        full_lengths: tokens of the text that each row is a part of.
        key: see :func:`length_key`.
    """
    groups: dict[Hashable, list[Tensor]] = {}
    start = 0
    for length, full in zip(lengths, full_lengths, strict=True):
        groups.setdefault(key(full), []).append(torch.arange(start, start + length))
        start += length
    return [(slice(None), torch.cat(tokens)) for tokens in groups.values()]


def padded_groups(lengths: Sequence[int], key: Callable[[int], Hashable]) -> Groups:
    """For R right-padded rows: the rows of each group, and the positions up to its longest row."""
    groups: dict[Hashable, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(key(length), []).append(row)
    return [(torch.tensor(rows), slice(max(lengths[row] for row in rows))) for rows in groups.values()]


@contextmanager
def frequencies_by_group(decoder: nn.Module, groups: Groups, rows: int) -> Iterator[None]:
    """Let the rotary modules run for each group by itself inside the context.

    Args:
        decoder: that runs.
        groups: of the positions (B, L).
        rows: B.
    """
    modules = length_dependent(decoder)
    for module in modules:
        module.forward = partial(_forward, module, type(module).forward, groups, rows)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _forward(
    module: nn.Module,
    forward: Callable[..., Any],
    groups: Groups,
    rows: int,
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What ``forward`` returns, (B, L, ...) tensors, with every group computed as if it were the whole batch."""
    positions = position_ids.expand(rows, -1)
    whole: list[Tensor] = []
    single = False
    for group in groups:
        _forget_lengths(module)
        out = forward(module, x, positions[group], *args, **kwargs)
        single = isinstance(out, Tensor)
        parts = [out] if single else list(out)
        if not whole:
            whole = [part.new_zeros(*positions.shape, *part.shape[2:]) for part in parts]
        for target, part in zip(whole, parts, strict=True):
            target[group] = part
    return whole[0] if single else tuple(whole)


def _forget_lengths(module: nn.Module) -> None:
    """Undo what dynamic NTK keeps of earlier lengths."""
    state: Any = module
    types = state.rope_type if isinstance(state.rope_type, dict) else {"": state.rope_type}
    for layer_type, kind in types.items():
        if "dynamic" in kind:
            prefix = f"{layer_type}_" if layer_type else ""
            device = getattr(state, f"{prefix}inv_freq").device
            original = getattr(state, f"{prefix}original_inv_freq").to(device)
            state.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(state, f"{prefix}max_seq_len_cached", state.original_max_seq_len)


@contextmanager
def short_limits(decoder: nn.Module, size: int = 8) -> Iterator[bool]:
    """Lower the lengths at which frequencies change to ``size`` tokens inside the context; yields whether any exist.

    So the probe's short rows show whether the length of one changes another.
    """
    key = "original_max_position_embeddings"
    modules: list[Any] = list(length_dependent(decoder))
    before = []
    for module in modules:
        rope = module.config.rope_parameters
        before += [(owner, owner[key]) for owner in (rope, *rope.values()) if isinstance(owner, dict) and key in owner]
    lengths = [module.original_max_seq_len for module in modules]
    try:
        for owner, _ in before:
            owner[key] = size
        for module in modules:
            module.original_max_seq_len = size
        yield bool(modules)
    finally:
        for owner, value in before[::-1]:
            owner[key] = value
        for module, value in zip(modules, lengths, strict=True):
            module.original_max_seq_len = value
            _forget_lengths(module)
