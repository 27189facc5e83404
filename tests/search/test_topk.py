"""Exact search equals sorting all scores, however the corpus is divided."""

from __future__ import annotations

import numpy as np
import pytest

from ullme.search import topk
from ullme.search.topk import exact_top_k


def blocks_of(vectors: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    return [(low, vectors[low : low + size]) for low in range(0, len(vectors), size)]


def by_sorting(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ vectors.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # the smaller row first among equals
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("size", [1, 3, 64, 1000])
def test_equals_sorting_with_ties_and_negative_scores(size, monkeypatch):
    """Whole numbers, so that no product is rounded and many scores are equal."""
    monkeypatch.setattr(topk, "QUERY_BLOCK", 3)
    draw = np.random.default_rng(0)
    queries = draw.integers(-2, 3, (7, 4)).astype(np.float32)
    vectors = draw.integers(-2, 3, (200, 4)).astype(np.float32)
    expected, rows = by_sorting(queries, vectors, 150)
    assert (expected < 0).any()
    assert (expected[:, :-1] == expected[:, 1:]).mean() > 0.5  # ties, or the test says nothing about their order
    found = exact_top_k(queries, blocks_of(vectors, size), 150)
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], rows)


def test_fewer_documents_than_asked_for():
    scores, rows = exact_top_k(np.ones((1, 2), np.float32), [(0, np.eye(2, dtype=np.float32))], 4)
    assert scores.tolist() == [[1.0, 1.0, -np.inf, -np.inf]]
    assert rows.tolist() == [[0, 1, -1, -1]]


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        exact_top_k(np.ones((1, 2), np.float32), [], 0)
