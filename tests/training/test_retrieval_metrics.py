"""The metrics of validation against ranks that are counted here."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from ullme.training.retrieval_metrics import retrieval_metrics


def test_a_relevant_passage_counts_whatever_the_sign_of_its_cosine():
    """12 queries with one relevant passage each; its rank r gives 1 / r, and 1 / log2(r + 1)."""
    queries, corpus = normalize(torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    similar = queries @ corpus.T
    assert (similar.diagonal() < 0).sum() >= 3, "without negative cosines there is nothing to test"
    ranks = 1 + (similar > similar.diagonal()[:, None]).sum(1)
    first = ranks <= 10
    assert 0 < first.sum() < 12
    found = retrieval_metrics(queries, corpus, [{n: 1} for n in range(12)])
    assert found["mrr@10"] == pytest.approx(torch.where(first, 1 / ranks, 0.0).mean().item(), abs=1e-6)
    assert found["ndcg@10"] == pytest.approx(torch.where(first, 1 / (ranks + 1).log2(), 0.0).mean().item(), abs=1e-6)
    assert found["recall@100"] == 1
