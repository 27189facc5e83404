"""Ranks of positives, and how well rankings agree."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from ullme.losses.ranking import rank_correlation, rank_of_first


def test_agreement_of_rankings_is_scipys_with_ties_too():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(5, (20, 9), generator=generator).double() for _ in range(2))
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert min(expected) < -0.2 < 0.2 < max(expected)
    assert rank_correlation(first, second).tolist() == pytest.approx(expected, abs=1e-6)


def test_two_candidates_and_equal_scores():
    first = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 3.0]])
    second = torch.tensor([[5.0, 6.0], [6.0, 5.0], [1.0, 2.0]])
    assert rank_correlation(first, second).tolist() == [1, -1, 0]


def test_scores_that_are_not_numbers_never_rank_the_positive_first():
    nan = float("nan")
    accuracy, reciprocal = rank_of_first(torch.tensor([[nan, 1.0, 2.0], [3.0, nan, 1.0], [3.0, 2.0, 1.0]]))
    assert accuracy.tolist() == [0, 0, 1]
    assert reciprocal.tolist() == [pytest.approx(1 / 3), 1 / 2, 1]
