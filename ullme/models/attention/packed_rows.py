"""Index arithmetic of the packed forward: where rows lie in the packed row, and which ones attention runs together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

# Rows share a group while the shortest has at least this fraction of the longest's tokens. It trades padding inside
# attention (a few per cent of the work) for fewer kernel calls.
_GROUP_RATIO = 0.85


@dataclass(frozen=True)
class Group:
    """n rows of similar length, padded to l tokens, that share one call of ``scaled_dot_product_attention``.

    Args:
        index: (n, l) position of each token in the packed row; padding repeats a row's first token.
        mask: (n, l) bool, True on real tokens, or None if every row has length l.
        keys: (n, k) positions of the tokens that the rows attend to, or None for their own tokens.
        key_mask: (n, k) bool, as ``mask``.
        offset: (n,) keys in front of the row's first token, i.e. tokens of its parent; None without parents.
    """

    index: Tensor
    mask: Tensor | None
    keys: Tensor | None = None
    key_mask: Tensor | None = None
    offset: Tensor | None = None


class PackedRows:
    """The layout of R rows in one packed row of T tokens.

    A row may continue another one, its parent: it attends to the parent's tokens too, and its position ids follow the
    parent's. So a prompt shared by several passages is in the packed row only once.

    Args:
        lengths: R numbers, the tokens of each row.
        device: where attention runs.
        parents: R indices of the row that each row continues, or -1; a parent has no parent itself. None: no row has.
    """

    def __init__(self, lengths: list[int], device: torch.device, parents: list[int] | None = None) -> None:
        self.host_lengths = lengths
        self.parents = parents
        self.host_offsets = [0 if p < 0 else lengths[p] for p in parents] if parents else [0] * len(lengths)
        self.max_length = max(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        self.offsets = torch.tensor(self.host_offsets, device=device)
        # (R + 1,) cumulative lengths, as varlen attention takes them
        self.cu_seqlens = pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
        # attention masks by group, made in the first layer and reused in the others
        self.masks: dict[object, Tensor | None] = {}

    @property
    def max_keys(self) -> int:
        """The most tokens that a row attends to, its parent's included."""
        return max(map(sum, zip(self.host_lengths, self.host_offsets, strict=True)))

    @property
    def full_lengths(self) -> list[int]:
        """Tokens of the text that each row is a part of: its parent's included, or its longest child's."""
        full = [sum(pair) for pair in zip(self.host_lengths, self.host_offsets, strict=True)]
        for row, parent in enumerate(self.parents or ()):
            if parent >= 0:
                full[parent] = max(full[parent], full[row])
        return full

    @cached_property
    def position_ids(self) -> Tensor:
        """(1, T) position ids, which start at 0 in every row, or at the length of its parent."""
        total = sum(self.host_lengths)
        starts = (self.cu_seqlens[:-1] - self.offsets).repeat_interleave(self.lengths, output_size=total)
        return (torch.arange(total, device=self.lengths.device) - starts)[None]

    @cached_property
    def groups(self) -> list[Group]:
        """The rows in order of decreasing length, in groups of similar length; rows with and without parent apart."""
        has_parent = [offset > 0 for offset in self.host_offsets]
        order = sorted(range(len(self.host_lengths)), key=lambda r: (has_parent[r], -self.host_lengths[r]))
        cuts = [0]
        for n, row in enumerate(order):
            first = order[cuts[-1]]
            if has_parent[row] != has_parent[first] or self.host_lengths[row] < _GROUP_RATIO * self.host_lengths[first]:
                cuts.append(n)
        return [self._group(order[a:b]) for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True)]

    def _group(self, rows: list[int]) -> Group:
        device = self.lengths.device
        chosen = torch.tensor(rows, device=device)
        lengths, starts = self.lengths[chosen, None], self.cu_seqlens[chosen, None].long()
        longest, shortest = self.host_lengths[rows[0]], self.host_lengths[rows[-1]]
        position = torch.arange(longest, device=device)
        mask = None if longest == shortest else position < lengths
        index = starts + position * (position < lengths)
        if self.parents is None or self.parents[rows[0]] < 0:
            return Group(index, mask)
        offset = self.offsets[chosen]
        parent_starts = self.cu_seqlens[torch.tensor([self.parents[r] for r in rows], device=device), None].long()
        position = torch.arange(max(self.host_lengths[r] + self.host_offsets[r] for r in rows), device=device)
        key_mask = position < lengths + offset[:, None]
        keys = torch.where(position < offset[:, None], parent_starts + position, starts + position - offset[:, None])
        return Group(index, mask, keys.masked_fill(~key_mask, 0), key_mask, offset)

    @cached_property
    def group_positions(self) -> Tensor:
        """Positions in the packed row of the tokens of all groups, padding included, group after group."""
        return torch.cat([group.index.flatten() for group in self.groups])

    @cached_property
    def group_key_positions(self) -> Tensor:
        """Positions in the packed row of the keys of all groups, padding included, group after group."""
        if self.parents is None:
            return self.group_positions
        return torch.cat([(group.index if group.keys is None else group.keys).flatten() for group in self.groups])

    @cached_property
    def ungroup_index(self) -> Tensor:
        """(T,) index of each token of the packed row in the concatenated groups: the inverse of ``group_positions``."""
        position = torch.empty(sum(self.host_lengths), dtype=torch.long, device=self.lengths.device)
        base = 0
        for group in self.groups:
            slots = torch.arange(base, base + group.index.numel(), device=position.device).view_as(group.index)
            real = slice(None) if group.mask is None else group.mask
            position[group.index[real].flatten()] = slots[real].flatten()
            base += group.index.numel()
        return position

    @cached_property
    def varlen_keys(self) -> tuple[Tensor | None, Tensor]:
        """For varlen attention: the (K,) positions of all rows' keys in order (None if they are the tokens themselves),
        and their (R + 1,) cumulative lengths."""
        if self.parents is None:
            return None, self.cu_seqlens
        device = self.lengths.device
        counts = self.lengths + self.offsets
        cu_seqlens = pad(counts.cumsum(0), (1, 0))
        total = sum(self.host_lengths) + sum(self.host_offsets)
        row = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=total)
        position = torch.arange(total, device=device) - cu_seqlens[row]
        parents = torch.tensor(self.parents, device=device).clamp(min=0)
        in_parent = position < self.offsets[row]
        parent_index = self.cu_seqlens[parents[row]] + position
        index = torch.where(in_parent, parent_index, self.cu_seqlens[row] + position - self.offsets[row])
        return index, cu_seqlens.to(torch.int32)


def real_lengths(attention_mask: Tensor) -> list[int]:
    """The number of real tokens of each of R rows.

    Raises:
        ValueError: a row has no real token, so there is nothing to pool.
    """
    lengths = attention_mask.sum(dim=1).tolist()
    if not lengths or min(lengths) == 0:
        where = f"row {lengths.index(0)} has" if lengths else "the batch has"
        raise ValueError(
            f"attention_mask: {where} no real token; give every text at least one (an empty text: the end token)"
        )
    return lengths
