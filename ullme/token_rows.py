"""Tokenised texts, and their masks on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ullme.utils.transfer import to_device


@dataclass(frozen=True)
class HostMasks:
    """The masks of R rows on the host, so that nobody waits for a device to learn which tokens are real.

    Args:
        attention: (R, L) bool, True on real tokens.
        pooled: (R, L) bool, True on the tokens that are pooled, or None where all real ones are.
    """

    attention: np.ndarray
    pooled: np.ndarray | None = None

    @classmethod
    def of(cls, attention_mask: Tensor, pool_mask: Tensor | None = None) -> HostMasks:
        """A copy of a device's masks, for which the host waits; on a CPU there is nothing to wait for."""
        attention, pooled = (
            None if mask is None else mask.detach().cpu().numpy().astype(bool) for mask in (attention_mask, pool_mask)
        )
        assert attention is not None
        return cls(attention, pooled)

    def __getitem__(self, rows: slice | np.ndarray) -> HostMasks:
        return HostMasks(self.attention[rows], None if self.pooled is None else self.pooled[rows])

    @property
    def lengths(self) -> np.ndarray:
        """(R,) int64, the real tokens of each row."""
        return self.attention.sum(1, dtype=np.int64)


@dataclass(frozen=True)
class TokenRows:
    """Tokenised texts, one a row.

    Args:
        input_ids: (R, L) token ids.
        attention_mask: (R, L), 1 on real tokens and 0 on padding, on either side.
        pool_mask: (R, L), 1 on the real tokens that are pooled, at least one a row; None pools all.
        host: the masks on the host, of rows that were moved to another device; None where the tensors are on the CPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pool_mask: Tensor | None = None
    host: HostMasks | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> TokenRows:
        if isinstance(rows, slice):
            return self._map(lambda x: x[rows], None if self.host is None else self.host[rows])
        if rows.device == self.input_ids.device:
            return self._map(lambda x: x[rows], None)
        (index,) = to_device([rows.cpu().numpy()], self.input_ids.device)
        return self.select(rows.cpu().numpy(), index)

    def select(self, rows: np.ndarray, index: Tensor) -> TokenRows:
        """Some rows, by their numbers.

        Args:
            rows: (n,) on the host.
            index: the same numbers on the device of the tensors.
        """
        return self._map(lambda x: x[index], None if self.host is None else self.host[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenRows:
        """On another device, with the masks kept on the host. Nobody waits for the copy of pinned memory."""
        host = None if torch.device(device).type == "cpu" else self.host_masks
        return self._map(lambda x: x.to(device, non_blocking=non_blocking or x.is_pinned()), host)

    def pin_memory(self) -> TokenRows:
        return self._map(lambda x: x.pin_memory(), self.host)

    def _map(self, change: Callable[[Tensor], Tensor], host: HostMasks | None) -> TokenRows:
        pool_mask = None if self.pool_mask is None else change(self.pool_mask)
        return TokenRows(change(self.input_ids), change(self.attention_mask), pool_mask, host)

    @property
    def host_masks(self) -> HostMasks:
        """The masks on the host; copied from the device, for which the host waits, where ``host`` is not there."""
        return HostMasks.of(self.attention_mask, self.pool_mask) if self.host is None else self.host

    @property
    def host_lengths(self) -> Tensor:
        """(R,) int64 on the CPU, the real tokens of each row."""
        if self.host is None:
            return self.attention_mask.sum(1).cpu()
        return torch.from_numpy(self.host.lengths)

    @property
    def pooled(self) -> Tensor:
        """(R, L), the pool mask, or the attention mask where all real tokens are pooled."""
        return self.attention_mask if self.pool_mask is None else self.pool_mask

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.host_lengths.sum())

    @classmethod
    def cat(cls, parts: list[TokenRows]) -> TokenRows:
        """Stack rows of different widths (each padded on the right) into one block as wide as the widest."""
        width = max(part.input_ids.shape[1] for part in parts)

        def widen(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]))

        def on_host(masks: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([np.pad(mask, ((0, 0), (0, width - mask.shape[1]))) for mask in masks])

        every = all(part.pool_mask is None for part in parts)
        hosts = [part.host for part in parts if part.host is not None]
        host = None
        if len(hosts) == len(parts):
            pooled = [masks.attention if masks.pooled is None else masks.pooled for masks in hosts]
            host = HostMasks(on_host([masks.attention for masks in hosts]), None if every else on_host(pooled))
        return cls(
            torch.cat([widen(part.input_ids) for part in parts]),
            torch.cat([widen(part.attention_mask) for part in parts]),
            None if every else torch.cat([widen(part.pooled) for part in parts]),
            host,
        )
