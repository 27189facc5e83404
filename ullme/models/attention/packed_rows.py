"""Where rows of different lengths lie in one packed row, and how attention's calls are cut from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

# Rows go into one group while the shortest is at least this share of the longest: it bounds the padding inside
# attention on the CPU (where attention is a few per cent of the work) against the number of kernel calls.
_GROUP_RATIO = 0.85


@dataclass(frozen=True)
class Group:
    """Rows of similar length that share one call of ``scaled_dot_product_attention``.

    Args:
        index: (n, l) position of each token in the packed row; padding repeats a real token.
        mask: (n, l) bool, True on real tokens, or None if every row has length l.
        keys: (n, k) positions that the rows may look at, or None for their own tokens.
        key_mask: (n, k) bool, as ``mask``.
        offset: (n,) how many keys stand before the row's first token.
    """

    index: Tensor
    mask: Tensor | None
    keys: Tensor | None = None
    key_mask: Tensor | None = None
    offset: Tensor | None = None


class PackedRows:
    """Where each row lies in the packed row of T tokens.

    A row may continue another, its parent: it then looks at the parent's tokens too, and its positions go on from
    there. So nine passages after one query need that query only once.

    Args:
        lengths: (R,) tokens of each row, on the host.
        device: where attention runs.
        parents: (R,) index of the row that each one continues, or -1; a parent has no parent itself.
    """

    def __init__(self, lengths: list[int], device: torch.device, parents: list[int] | None = None) -> None:
        self.host_lengths = lengths
        self.parents = parents
        self.host_offsets = [0 if p < 0 else lengths[p] for p in parents] if parents else [0] * len(lengths)
        self.max_length = max(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        self.offsets = torch.tensor(self.host_offsets, device=device)
        # (R + 1,) borders of the rows, as varlen attention wants them
        self.borders = pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
        # what attention keeps from layer to layer
        self.masks: dict[object, Tensor | None] = {}

    @property
    def max_keys(self) -> int:
        """The most tokens that a row looks at."""
        return max(map(sum, zip(self.host_lengths, self.host_offsets, strict=True)))

    @cached_property
    def position_ids(self) -> Tensor:
        """(1, T), starting in every row at 0, or where its parent ends."""
        total = sum(self.host_lengths)
        starts = (self.borders[:-1] - self.offsets).repeat_interleave(self.lengths, output_size=total)
        return (torch.arange(total, device=self.lengths.device) - starts)[None]

    @cached_property
    def groups(self) -> list[Group]:
        """Rows by falling length, cut where a row is much shorter than the longest of its group."""
        continued = [offset > 0 for offset in self.host_offsets]
        order = sorted(range(len(self.host_lengths)), key=lambda r: (continued[r], -self.host_lengths[r]))
        cuts = [0]
        for n, row in enumerate(order):
            first = order[cuts[-1]]
            if continued[row] != continued[first] or self.host_lengths[row] < _GROUP_RATIO * self.host_lengths[first]:
                cuts.append(n)
        return [self._group(order[a:b]) for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True)]

    def _group(self, rows: list[int]) -> Group:
        device = self.lengths.device
        chosen = torch.tensor(rows, device=device)
        lengths, starts = self.lengths[chosen, None], self.borders[chosen, None].long()
        longest, shortest = self.host_lengths[rows[0]], self.host_lengths[rows[-1]]
        place = torch.arange(longest, device=device)
        mask = None if longest == shortest else place < lengths
        index = starts + place * (place < lengths)
        if self.parents is None or self.parents[rows[0]] < 0:
            return Group(index, mask)
        offset = self.offsets[chosen]
        parent_starts = self.borders[torch.tensor([self.parents[r] for r in rows], device=device), None].long()
        place = torch.arange(max(self.host_lengths[r] + self.host_offsets[r] for r in rows), device=device)
        key_mask = place < lengths + offset[:, None]
        keys = torch.where(place < offset[:, None], parent_starts + place, starts + place - offset[:, None])
        return Group(index, mask, keys.masked_fill(~key_mask, 0), key_mask, offset)

    @cached_property
    def grouped(self) -> Tensor:
        """Positions of the groups' tokens in the packed row, group after group."""
        return torch.cat([group.index.flatten() for group in self.groups])

    @cached_property
    def grouped_keys(self) -> Tensor:
        """Likewise, of what the groups look at."""
        if self.parents is None:
            return self.grouped
        return torch.cat([(group.index if group.keys is None else group.keys).flatten() for group in self.groups])

    @cached_property
    def ungroup(self) -> Tensor:
        """(T,) where each token of the packed row stands among the concatenated groups."""
        place = torch.empty(sum(self.host_lengths), dtype=torch.long, device=self.lengths.device)
        base = 0
        for group in self.groups:
            slots = torch.arange(base, base + group.index.numel(), device=place.device).view_as(group.index)
            real = slice(None) if group.mask is None else group.mask
            place[group.index[real].flatten()] = slots[real].flatten()
            base += group.index.numel()
        return place

    @cached_property
    def keys(self) -> tuple[Tensor | None, Tensor]:
        """For varlen attention: the (K,) positions of all rows' keys in order (None: the tokens themselves), and the
        (R + 1,) borders between rows."""
        if self.parents is None:
            return None, self.borders
        device = self.lengths.device
        counts = self.lengths + self.offsets
        borders = pad(counts.cumsum(0), (1, 0))
        total = sum(self.host_lengths) + sum(self.host_offsets)
        row = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=total)
        place = torch.arange(total, device=device) - borders[row]
        parents = torch.tensor(self.parents, device=device).clamp(min=0)
        inside = place < self.offsets[row]
        index = torch.where(inside, self.borders[parents[row]] + place, self.borders[row] + place - self.offsets[row])
        return index, borders.to(torch.int32)


def real_lengths(attention_mask: Tensor) -> list[int]:
    """(R,) real tokens of each row, on the host.

    Raises:
        ValueError: a row has no real token, so there is nothing to pool.
    """
    lengths = attention_mask.sum(dim=1).tolist()
    if not lengths or min(lengths) == 0:
        where = f"row {lengths.index(0)} has" if lengths else "the batch has"
        raise ValueError(f"attention_mask: {where} no real token; every text needs at least one (an empty text: eos)")
    return lengths
