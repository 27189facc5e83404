"""Retrieval metrics of rankings and of embeddings in memory, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ullme.distributed import no_collectives
from ullme.training.validation import CorpusRanking

DEPTH = 100
# Passages whose similarities with all queries are in memory at once.
_BLOCK = 1024


def retrieval_metrics(
    queries: Tensor, corpus: Tensor, relevant: list[dict[int, int]], left_out: list[int | None] | None = None
) -> dict[str, float]:
    """nDCG@10, MRR@10 and Recall@100 by cosine similarity, averaged over queries, on one rank.

    Args:
        queries: (Q, D) normalised embeddings.
        corpus: (P, D) normalised embeddings.
        relevant: for each query, index in the corpus -> relevance grade (0 is not relevant).
        left_out: for each query, the index of its own copy in the corpus, which is not ranked, or None.

    Returns:
        ``ndcg@10``, ``mrr@10``, ``recall@100``, from 0 to 1.
    """
    ranking = CorpusRanking(len(queries), len(corpus), queries.shape[1], DEPTH, queries.device, left_out)
    ranking.add_queries(queries, torch.arange(len(queries), device=queries.device))
    with no_collectives():
        for block in torch.arange(len(corpus), device=corpus.device).split(_BLOCK):
            ranking.add_passages(corpus[block], block)
    return ranking_metrics(ranking.best(), relevant)


def ranking_metrics(found: Tensor, relevant: Sequence[dict[int, int]]) -> dict[str, float]:
    """nDCG@10, MRR@10 and Recall@100 of rankings, averaged over queries.

    Args:
        found: (Q, :data:`DEPTH`) int64 passages of each query, the nearest first; -1 stands for none, at the end.
        relevant: for each query, passage -> relevance grade (0 is not relevant).

    Returns:
        ``ndcg@10``, ``mrr@10``, ``recall@100``, from 0 to 1.
    """
    from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

    scores, grades, indexes = [], [], []
    for row, (judged, places) in enumerate(zip(relevant, found.tolist(), strict=True)):
        retrieved = [passage for passage in places if passage >= 0]
        # Relevant passages below the cut-off are included: recall and the ideal ranking count them.
        missed = [passage for passage, grade in judged.items() if grade > 0 and passage not in set(retrieved)]
        passages = retrieved + missed
        # The order stands for the cosines: torchmetrics counts no passage as found whose score is not above 0.
        scores.append(torch.arange(len(passages), 0, -1, dtype=torch.float32))
        grades.append(torch.tensor([max(judged.get(passage, 0), 0) for passage in passages]))
        indexes.append(torch.full((len(passages),), row))
    preds, target, index = torch.cat(scores), torch.cat(grades), torch.cat(indexes)
    return {
        "ndcg@10": float(RetrievalNormalizedDCG(top_k=10)(preds, target, indexes=index)),
        "mrr@10": float(RetrievalMRR(top_k=10)(preds, target > 0, indexes=index)),
        "recall@100": float(RetrievalRecall(top_k=DEPTH)(preds, target > 0, indexes=index)),
    }
