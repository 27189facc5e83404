"""Random numbers by counter."""

from __future__ import annotations

import torch

from ullme.utils.counter_random import random_bits, random_uniform


def test_the_numbers_are_splitmix64s():
    """The first outputs for the seed 0, as its authors' C code prints them."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert random_bits(0, torch.arange(3)).tolist() == [number >> 33 for number in published]
    assert random_uniform(0, torch.arange(3)).tolist() == [(number >> 40) / 2**24 for number in published]


def test_counters_are_independent_of_each_other():
    rows, columns = torch.arange(300)[:, None], torch.arange(300)
    numbers = random_uniform(torch.tensor(-5), rows, columns)
    assert numbers.shape == (300, 300)
    assert 0 <= numbers.min() < numbers.max() < 1
    correlations = torch.corrcoef(numbers) - torch.eye(300)
    assert correlations.abs().max() < 0.3  # five standard deviations of 1 / sqrt(300)
    assert (numbers - numbers.T).abs().mean() > 0.3  # a third, of two independent numbers
