"""A random order without an array: a permutation, another one for each key, as random as numpy's."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from ullme.data.order import FeistelOrder, ShuffledOrder, random_order


def rows_of(num_rows: int, *key: int) -> list[int]:
    return FeistelOrder(num_rows, key).at(np.arange(num_rows)).tolist()


def reference(num_rows: int, key: list[int], position: int) -> int:
    """The permutation again, as the class describes it, with the numbers of SplitMix64 drawn one after the other."""

    def split_mix(seed: int, count: int) -> int:
        state = seed
        for _ in range(count + 1):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        return mixed ^ mixed >> 31

    a = math.ceil(math.sqrt(num_rows))
    b = math.ceil(num_rows / a)
    keys = np.random.SeedSequence(key).generate_state(16, np.uint64).tolist()
    while True:
        half = {"left": position // b, "right": position % b}
        for i, k in enumerate(keys):
            changed, other, size = ("left", "right", a) if i % 2 == 0 else ("right", "left", b)
            half[changed] = (half[changed] + split_mix(k, half[other])) % size
        position = half["left"] * b + half["right"]
        if position < num_rows:
            return position


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7, 30, 101, 210])
def test_equals_its_description(num_rows):
    expected = [reference(num_rows, [42, 3], position) for position in range(num_rows)]
    assert rows_of(num_rows, 42, 3) == expected
    assert num_rows < 5 or expected != sorted(expected)


def test_split_mix_is_the_published_generator():
    from ullme.data.order import _split_mix

    # the first three numbers of the generator with the seed 1234567, as the reference implementation prints them
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [_split_mix(1234567, i) for i in range(3)] == expected
    assert _split_mix(1234567, np.arange(3, dtype=np.uint64)).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 1000))
def test_is_a_permutation_with_an_inverse(num_rows, seed, epoch):
    order = FeistelOrder(num_rows, [seed, epoch])
    rows = order.at(np.arange(num_rows))
    assert sorted(rows.tolist()) == list(range(num_rows))
    for position in {0, num_rows // 2, num_rows - 1}:
        assert order[position] == rows[position]
        assert order.position_of(order[position]) == position


@pytest.mark.parametrize("num_rows", [100_000_001, 2**40 + 1, 2**62])
def test_needs_no_array(num_rows):
    order = FeistelOrder(num_rows, [1, 2])
    positions = np.linspace(0, num_rows - 1, 200, dtype=np.uint64).astype(np.int64).clip(0, num_rows - 1)
    rows = order.at(positions)
    assert [order.position_of(row) for row in rows.tolist()] == positions.tolist()
    assert [order[position] for position in positions[:20].tolist()] == rows[:20].tolist()
    assert rows.max() > num_rows // 2


def test_every_key_has_its_own_order():
    orders = [rows_of(1001, *key) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (2**33, 0)]]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 10  # by chance, one


def chi_square_of_places(order, num_rows: int, draws: int) -> float:
    """p value of: every row stands at every position equally often."""
    counts = np.zeros((num_rows, num_rows))
    for seed in range(draws):
        counts[np.arange(num_rows), order(num_rows, seed)] += 1
    expected = draws / num_rows
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), (num_rows - 1) ** 2)


def chi_square_of_steps(order, num_rows: int, draws: int) -> float:
    """p value of: the next row is any other, equally often."""
    steps = np.zeros(num_rows)
    for seed in range(draws):
        np.add.at(steps, np.diff(order(num_rows, seed)) % num_rows, 1)
    expected = draws  # (num_rows - 1) steps of a draw over as many values
    return chi2.sf(((steps[1:] - expected) ** 2 / expected).sum(), num_rows - 2)


def feistel(num_rows, seed):
    return FeistelOrder(num_rows, [seed]).at(np.arange(num_rows))


def of_numpy(num_rows, seed):
    return np.random.default_rng([seed]).permutation(num_rows)


def rotated(num_rows, seed):
    """Every row is everywhere equally often, but the next row is always the same."""
    return (np.arange(num_rows) + seed) % num_rows


@pytest.mark.parametrize("num_rows", [9, 16, 31, 64])
@pytest.mark.parametrize("statistic", [chi_square_of_places, chi_square_of_steps])
def test_is_as_random_as_numpys(num_rows, statistic):
    assert statistic(of_numpy, num_rows, 400) > 0.01
    assert statistic(feistel, num_rows, 400) > 0.01


def test_the_statistics_can_fail():
    assert chi_square_of_steps(rotated, 31, 400) < 1e-9
    assert chi_square_of_places(lambda n, seed: np.roll(np.arange(n), seed % 2), 31, 400) < 1e-9


def test_all_orders_of_five_rows_come_equally_often():
    counts = Counter(tuple(FeistelOrder(5, [seed])) for seed in range(1800))
    statistic = sum((counts[order] - 15) ** 2 / 15 for order in permutations(range(5)))
    assert chi2.sf(statistic, 119) > 0.01


def test_is_small_to_send_to_a_worker():
    order = FeistelOrder(10**9, [3, 4])
    assert len(pickle.dumps(order)) < 1000
    assert pickle.loads(pickle.dumps(order))[12345] == order[12345]


def test_versions():
    old, new = (random_order(50, [7, 1], version) for version in (1, 2))
    assert isinstance(old, ShuffledOrder)
    assert old.at(np.arange(50)).tolist() == np.random.default_rng([7, 1]).permutation(50).tolist()
    assert old[3] == old.at(np.array([3]))[0]
    assert isinstance(new, FeistelOrder)
    assert len(old) == len(new) == 50
    with pytest.raises(ValueError, match=r"has version 3 in this checkpoint.*resume with the release that wrote"):
        random_order(50, [7, 1], 3)


@pytest.mark.parametrize("position", [-1, 50])
def test_no_such_row(position):
    order = FeistelOrder(50, [0])
    for find in (order.__getitem__, order.position_of):
        with pytest.raises(IndexError, match=f"{position} of 50"):
            find(position)
