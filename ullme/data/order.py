"""Random orders of rows, computed from a position without an array of all rows.

A checkpoint names the version of the order it was trained in (``ORDER_VERSION`` is that of new runs), so that a
resumed run goes on in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, Protocol, TypeVar

import numpy as np

# 1: numpy's permutation, an array of all rows in the memory of every process. 2: FeistelOrder.
ORDER_VERSION = 2

ROUNDS = 16  # with fewer, some orders of 5 to 7 rows come more often than others
_MASK = 2**64 - 1
# SplitMix64
_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

_Number = TypeVar("_Number", int, np.ndarray)


class Order(Protocol):
    """The type of an order of ``len(order)`` rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> int:
        """The row at a position."""
        ...

    def at(self, positions: np.ndarray) -> np.ndarray:
        """(n,) rows at (n,) positions."""
        ...


class FeistelOrder:
    """A pseudorandom permutation of ``num_rows`` rows: a generalised Feistel network with cycle walking.

    With a = ⌈√n⌉ and b = ⌈n / a⌉, a position is written as left · b + right with left < a and right < b. Of the 16
    rounds i = 0 ... 15, an even one replaces left by (left + F_i(right)) mod a, an odd one replaces right by
    (right + F_i(left)) mod b. What comes out at n or above (there are fewer than a of these numbers) goes in again,
    until it is below n. F_i(x) is number x, counted from 0, of SplitMix64 with the seed K_i, and K_0 ... K_15 are
    ``numpy.random.SeedSequence(key).generate_state(16, numpy.uint64)``.

    References: the network and cycle walking, Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002,
    sections 4 and 5; SplitMix64, Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    It is random as a shuffle is, not as a cipher: nothing is secret.

    Args:
        num_rows: n, at most 2^62.
        key: numbers that are not negative, such as seed and epoch; another key is another permutation (but for zeros
            at its end, which SeedSequence does not see).
    """

    def __init__(self, num_rows: int, key: Sequence[int]) -> None:
        self.num_rows = num_rows
        self._left = isqrt(max(0, num_rows - 1)) + 1
        self._right = -(-num_rows // self._left)
        self._keys = [int(k) for k in np.random.SeedSequence(list(key)).generate_state(ROUNDS, np.uint64)]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.num_rows:
            raise IndexError(f"position {position} of {self.num_rows}")
        row = self._encrypt(int(position))
        while row >= self.num_rows:
            row = self._encrypt(row)
        return row

    def at(self, positions: np.ndarray) -> np.ndarray:
        """(n,) rows at (n,) positions, which must be below ``num_rows``."""
        rows = self._encrypt(np.asarray(positions, dtype=np.uint64))
        while (outside := rows >= self.num_rows).any():
            rows[outside] = self._encrypt(rows[outside])
        return rows.astype(np.int64)

    def position_of(self, row: int) -> int:
        """Where a row stands; the inverse of ``order[position]``. Raises: IndexError: there is no such row."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        position = self._decrypt(row)
        while position >= self.num_rows:
            position = self._decrypt(position)
        return position

    def _encrypt(self, number: _Number) -> _Number:
        left, right = number // self._right, number % self._right
        for i in range(0, ROUNDS, 2):
            left = (left + _split_mix(self._keys[i], right) % self._left) % self._left
            right = (right + _split_mix(self._keys[i + 1], left) % self._right) % self._right
        return left * self._right + right

    def _decrypt(self, number: int) -> int:
        left, right = divmod(number, self._right)
        for i in reversed(range(0, ROUNDS, 2)):
            right = (right - _split_mix(self._keys[i + 1], left)) % self._right
            left = (left - _split_mix(self._keys[i], right)) % self._left
        return left * self._right + right


class ShuffledOrder:
    """An order of version 1: an array.

    Args:
        rows: (num_rows,) the rows in their order.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> int:
        return int(self.rows[position])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """(n,) rows at (n,) positions."""
        return self.rows[positions]


def random_order(num_rows: int, key: Sequence[int], version: int = ORDER_VERSION) -> Order:
    """A random order of rows.

    Args:
        num_rows: how many.
        key: numbers that are not negative, such as seed and epoch.
        version: see ``ORDER_VERSION``.

    Raises:
        ValueError: a version that this release does not know.
    """
    if version == 1:
        return ShuffledOrder(np.random.default_rng(list(key)).permutation(num_rows))
    if version == 2:
        return FeistelOrder(num_rows, key)
    raise ValueError(
        f"the order of rows has version {version} in this checkpoint, and this release of ullme knows 1 and "
        f"{ORDER_VERSION}; resume with the release that wrote the checkpoint"
    )


def _split_mix(seed: int, index: _Number) -> _Number:
    """Number ``index`` of SplitMix64; the masks change nothing for an array of uint64, which wraps around by itself."""
    z: Any = (((index + 1) * _GAMMA & _MASK) + seed) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)
