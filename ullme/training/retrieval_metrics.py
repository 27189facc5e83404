"""Retrieval metrics of embeddings in memory, by torchmetrics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ullme.utils.transfer import to_device

DEPTH = 100
# Queries whose similarities with the whole corpus are in memory at once.
_BLOCK = 256


def retrieval_metrics(
    queries: Tensor, corpus: Tensor, relevant: list[dict[int, int]], left_out: list[int | None] | None = None
) -> dict[str, float]:
    """nDCG@10, MRR@10 and Recall@100 by cosine similarity, averaged over queries.

    Args:
        queries: (Q, D) normalised embeddings.
        corpus: (P, D) normalised embeddings.
        relevant: for each query, index in the corpus -> relevance grade (0 is not relevant).
        left_out: for each query, the index of its own copy in the corpus, which is not ranked, or None.

    Returns:
        ``ndcg@10``, ``mrr@10``, ``recall@100``, from 0 to 1.
    """
    from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

    copies = np.array([-1 if copy is None else copy for copy in left_out or [None] * len(queries)], dtype=np.int64)
    copy_places, is_copy = to_device([copies.clip(0), copies >= 0], queries.device)
    best: list[Tensor] = []  # for each block, on the device: the passages found, the nearest first
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        similar = queries[block].float() @ corpus.float().T
        own = torch.where(is_copy[block], -torch.inf, similar.gather(1, copy_places[block, None])[:, 0])
        similar.scatter_(1, copy_places[block, None], own[:, None])
        best.append(similar.topk(min(DEPTH, len(corpus)), dim=1).indices)
    scores, grades, indexes = [], [], []
    for row, (judged, found) in enumerate(zip(relevant, torch.cat(best).tolist(), strict=True)):  # the one wait
        retrieved = [passage for passage in found if passage != copies[row]]
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
