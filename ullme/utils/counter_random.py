"""Random numbers that are a function of a seed and of counters.

What is drawn for a row and a token does not depend on what was drawn before, on which device, or in which chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


_INCREMENT, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_bits(seed: Tensor | int, *counters: Tensor) -> Tensor:
    """Output number ``counter`` of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi 10.1145/2660193.2660195).

    Of several counters each is read by a generator that the output for those before it seeds.

    Args:
        seed: any int64.
        counters: int64, of shapes that broadcast.

    Returns:
        int64 from 0 to 2**31 - 1, of the counters' common shape: the output's highest bits.
    """
    state = torch.as_tensor(seed, dtype=torch.int64)
    for counter in counters:
        state = _mix(state + (counter + 1) * _INCREMENT)  # products and sums of int64 are modulo 2**64
    return _shift(state, 33)


def random_uniform(seed: Tensor | int, *counters: Tensor) -> Tensor:
    """As :func:`random_bits`, float32 from 0 to below 1, in steps of 2**-24."""
    return (random_bits(seed, *counters) >> 7) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left; ``>>`` would repeat the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
