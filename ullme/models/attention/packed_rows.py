"""Index arithmetic of the packed forward: where rows lie in the packed row, and which ones attention runs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ullme.token_rows import HostMasks
from ullme.utils.transfer import to_device

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


@dataclass(frozen=True)
class Grouping:
    """All groups of a packed row of T tokens.

    Args:
        groups: in the order of the positions below.
        positions: positions in the packed row of the tokens of all groups, padding included, group after group.
        key_positions: likewise of their keys.
        ungroup_index: (T,) index of each token of the packed row in the concatenated groups: the inverse of
            ``positions``.
    """

    groups: list[Group]
    positions: Tensor
    key_positions: Tensor
    ungroup_index: Tensor


class PackedRows:
    """The layout of R rows in one packed row of T tokens.

    A row may continue another one, its parent: it attends to the parent's tokens too, and its position ids follow the
    parent's. So a prompt shared by several passages is in the packed row only once.

    All index arithmetic is done on the host, and what attention needs goes to the device in one copy.

    Args:
        lengths: R numbers, the tokens of each row.
        device: where attention runs.
        parents: R indices of the row that each row continues, or -1; a parent has no parent itself. None: no row has.
        indices: further int64 arrays that the caller wants on the device, which travel in the same copy.

    Attributes:
        lengths: (R,) tokens of each row, on the device.
        cu_seqlens: (R + 1,) int32 cumulative lengths, as varlen attention takes them.
        layout: (1 + 2R,) int64 on the host: R, the lengths, the parents.
        position_ids: (1, T), which start at 0 in every row, or at the length of its parent.
        varlen_keys: for varlen attention: the (K,) positions of all rows' keys in order (None if they are the tokens
            themselves), and their (R + 1,) int32 cumulative lengths.
        indices: on the device.
        masks: attention masks by group, made in the first layer and reused in the others.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        device: torch.device,
        parents: Sequence[int] | np.ndarray | None = None,
        indices: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._parents = None if parents is None else np.asarray(parents, dtype=np.int64)
        offsets = np.zeros_like(self._lengths)
        if self._parents is not None:
            offsets = np.where(self._parents < 0, 0, self._lengths[self._parents])
        self._offsets = offsets
        some_parents = np.full_like(self._lengths, -1) if self._parents is None else self._parents
        self.layout = torch.from_numpy(np.concatenate([np.array([len(offsets)]), self._lengths, some_parents]))
        ends = np.cumsum(self._lengths)
        self._starts = ends - self._lengths
        self.host_lengths: list[int] = self._lengths.tolist()
        self.max_length = int(self._lengths.max())
        self.max_keys = int((self._lengths + offsets).max())
        position_ids = np.arange(ends[-1]) - np.repeat(self._starts - offsets, self._lengths)
        given = dict(indices or {})
        arrays = [self._lengths, np.append(0, ends), position_ids, *given.values()]
        # a CPU has no varlen kernel
        with_keys = self._parents is not None and device.type != "cpu"
        copied = to_device([*arrays, *self._keys()] if with_keys else arrays, device)
        self.device, self.lengths = device, copied[0]
        self.cu_seqlens, self.position_ids = copied[1].to(torch.int32), copied[2][None]
        self.indices = dict(zip(given, copied[3:], strict=False))
        self.varlen_keys: tuple[Tensor | None, Tensor] = (None, self.cu_seqlens)
        if with_keys:
            self.varlen_keys = copied[-2], copied[-1].to(torch.int32)
        self.masks: dict[object, Tensor | None] = {}

    @property
    def has_parents(self) -> bool:
        """Whether a row continues another one."""
        return bool(self._offsets.any())

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(n, l) of n consecutive rows that all have l tokens, run after run."""
        starts = np.flatnonzero(np.diff(self._lengths, prepend=0))
        counts = np.diff(starts, append=len(self._lengths))
        return list(zip(counts.tolist(), self._lengths[starts].tolist(), strict=True))

    @property
    def full_lengths(self) -> list[int]:
        """Tokens of the text that each row is a part of: its parent's included, or its longest child's."""
        full = self._lengths + self._offsets
        if self._parents is not None:
            children = self._parents >= 0
            np.maximum.at(full, self._parents[children], full[children])
        return full.tolist()

    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of all rows' keys, row after row, and the (R + 1,) cumulative numbers of keys."""
        assert self._parents is not None
        counts = self._lengths + self._offsets
        ends = np.cumsum(counts)
        row = np.repeat(np.arange(len(counts)), counts)
        position = np.arange(ends[-1]) - (ends - counts)[row]
        in_parent = position < self._offsets[row]
        index = np.where(in_parent, self._starts[self._parents[row]], self._starts[row] - self._offsets[row]) + position
        return index, np.append(0, ends)

    @cached_property
    def grouping(self) -> Grouping:
        """The rows in order of decreasing length, in groups of similar length; rows with and without parent apart."""
        arrays: list[np.ndarray] = []
        fields: list[list[int | None]] = []  # of each group, where its fields are among the arrays
        for group in map(self._group, self._rows_of_groups()):
            fields.append([])
            for array in group:
                fields[-1].append(None if array is None else len(arrays))
                if array is not None:
                    arrays.append(array)
        indices = [arrays[places[0]] for places in fields]  # type: ignore[index]
        keys = [arrays[places[0] if places[2] is None else places[2]] for places in fields]  # type: ignore[index]
        ungroup_index = np.empty(len(self.position_ids[0]), dtype=np.int64)
        base = 0
        for index, places in zip(indices, fields, strict=True):
            slots = np.arange(base, base + index.size).reshape(index.shape)
            real = slice(None) if places[1] is None else arrays[places[1]]
            ungroup_index[index[real].ravel()] = slots[real].ravel()
            base += index.size
        flat = [np.concatenate([index.ravel() for index in part]) for part in (indices, keys)]
        *copied, positions, key_positions, ungroup = to_device([*arrays, *flat, ungroup_index], self.device)
        groups = [Group(*(None if place is None else copied[place] for place in places)) for places in fields]  # type: ignore[arg-type]
        return Grouping(groups, positions, key_positions, ungroup)

    @property
    def groups(self) -> list[Group]:
        """See :attr:`grouping`."""
        return self.grouping.groups

    def _rows_of_groups(self) -> list[np.ndarray]:
        """The indices of the rows of each group, the longest row first."""
        has_parent = self._offsets > 0
        order = np.lexsort((-self._lengths, has_parent))
        cuts = [0]
        for n, row in enumerate(order):
            first = order[cuts[-1]]
            if has_parent[row] != has_parent[first] or self._lengths[row] < _GROUP_RATIO * self._lengths[first]:
                cuts.append(n)
        return np.split(order, cuts[1:])

    def _group(self, rows: np.ndarray) -> tuple[np.ndarray | None, ...]:
        """The fields of a :class:`Group`, on the host."""
        lengths, starts = self._lengths[rows, None], self._starts[rows, None]
        position = np.arange(lengths[0, 0])
        real = position < lengths
        mask = None if lengths[0] == lengths[-1] else real
        index = starts + position * real
        if self._parents is None or self._parents[rows[0]] < 0:
            return index, mask, None, None, None
        offset = self._offsets[rows, None]
        parent_starts = self._starts[self._parents[rows], None]
        position = np.arange((lengths + offset).max())
        key_mask = position < lengths + offset
        keys = np.where(position < offset, parent_starts + position, starts + position - offset)
        return index, mask, np.where(key_mask, keys, 0), key_mask, offset[:, 0]


def real_lengths(host: HostMasks) -> np.ndarray:
    """(R,) the number of real tokens of each row.

    Raises:
        ValueError: a row has no real token, so there is nothing to pool.
    """
    lengths = host.lengths
    if not lengths.size or lengths.min() == 0:
        where = f"row {int(lengths.argmin())} has" if lengths.size else "the batch has"
        raise ValueError(
            f"attention_mask: {where} no real token; give every text at least one (an empty text: the end token)"
        )
    return lengths
