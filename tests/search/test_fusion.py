"""Fusion by ranks and by scores, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ullme.search import fusion
from ullme.search.fusion import convex_combination, fuse, reciprocal_rank_fusion


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


DENSE = np.array([[0.9, 0.8, 0.5]]), np.array([[5, 3, 9]])
WORDS = np.array([[8.0, 2.0, -np.inf]]), np.array([[3, 7, -1]])


def test_scores_by_hand():
    """Dense 1, 0.75, 0; BM25 1, 0.25; who is not found by one has its 0."""
    scores, rows = convex_combination(DENSE, WORDS, 5, 0.4)
    assert rows.tolist() == [[3, 5, 7, 9, -1]]
    assert scores[0] == pytest.approx([0.4 * 0.75 + 0.6, 0.4, 0.6 * 0.25, 0.0, -np.inf])
    for weight, expected in ((0.0, [3, 7, -1]), (1.0, [5, 3, 9])):
        assert convex_combination(DENSE, WORDS, 3, weight)[1].tolist() == [expected]


def test_scores_beyond_the_depth_do_not_change_the_scale(monkeypatch):
    """And a document that was not found is below those that were."""
    monkeypatch.setattr(fusion, "DEPTH", 2)
    dense = np.array([[0.9, 0.8, 0.7]]), np.array([[1, 2, 3]])
    scores, rows = convex_combination(dense, (np.array([[4.0]]), np.array([[4]])), 4, 0.5)
    # dense 1, 0 and -1, which is also that of document 4
    assert rows.tolist() == [[1, 2, 4, 3]]
    assert scores[0] == pytest.approx([0.5, 0.0, 0.5 - 0.5, -0.5])


def test_rankings_without_differences():
    nothing = np.full((1, 2), -np.inf), np.full((1, 2), -1)
    same = np.array([[0.5, 0.5]]), np.array([[4, 2]])
    scores, rows = convex_combination(same, nothing, 3, 0.5)
    assert rows.tolist() == [[2, 4, -1]]
    assert scores[0, :2].tolist() == [0.5, 0.5]
    assert convex_combination(nothing, nothing, 2, 0.5)[1].tolist() == [[-1, -1]]


def test_scores_keep_how_far_the_best_is_ahead():
    """Dense search hardly tells two documents apart, and BM25 clearly: by ranks dense search decides, of more weight."""
    dense = np.array([[0.9, 0.899, 0.5]]), np.array([[2, 1, 3]])
    words = np.array([[9.0, 1.0]]), np.array([[1, 2]])
    assert fuse(dense, words, 1, 0.6, "scores")[1].tolist() == [[1]]
    assert fuse(dense, words, 1, 0.6, "rrf")[1].tolist() == [[2]]
