"""Reciprocal rank fusion by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ullme.search.fusion import reciprocal_rank_fusion


def test_by_hand():
    dense = np.array([[5, 3, 9], [1, -1, -1]])
    words = np.array([[3, 7, -1], [-1, -1, -1]])
    scores, rows = reciprocal_rank_fusion([dense, words], 4)
    assert rows.tolist() == [[3, 5, 7, 9], [1, -1, -1, -1]]
    assert scores[0] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])
    assert scores[1].tolist() == [np.float32(1 / 61), -np.inf, -np.inf, -np.inf]


def test_equal_scores_come_in_the_order_of_rows():
    scores, rows = reciprocal_rank_fusion([np.array([[9, 2]]), np.array([[2, 9]])], 1, constant=0)
    assert (rows.tolist(), scores.tolist()) == ([[2]], [[1.5]])


def test_weights_by_hand():
    dense, words = np.array([[5, 3]]), np.array([[3, 7]])
    scores, rows = reciprocal_rank_fusion([dense, words], 3, weights=[0.5, 1.5])
    assert rows.tolist() == [[3, 7, 5]]
    assert scores[0] == pytest.approx([0.5 / 62 + 1.5 / 61, 1.5 / 62, 0.5 / 61])
    scores, rows = reciprocal_rank_fusion([dense, words], 3, weights=[0.0, 2.0])
    assert rows.tolist() == [[3, 7, -1]]
