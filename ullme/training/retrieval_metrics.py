"""Retrieval metrics of embeddings in memory, by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 100


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

    scores, grades, indexes = [], [], []
    for start in range(0, len(queries), 256):
        block = queries[start : start + 256].float() @ corpus.float().T
        own = [None] * len(block) if left_out is None else left_out[start : start + 256]
        for row, copy in enumerate(own):
            if copy is not None:
                block[row, copy] = -torch.inf
        top = block.topk(min(DEPTH, len(corpus)), dim=1).indices
        for row, found in enumerate(top):
            judged = relevant[start + row]
            retrieved = found if own[row] is None else found[found != own[row]]
            # Relevant passages below the cut-off are included: recall and the ideal ranking count them.
            missed = [p for p in judged if judged[p] > 0 and p not in set(retrieved.tolist())]
            passages = torch.cat([retrieved, torch.tensor(missed, dtype=torch.long, device=retrieved.device)])
            scores.append(block[row, passages].cpu())
            grades.append(torch.tensor([max(judged.get(int(p), 0), 0) for p in passages]))
            indexes.append(torch.full((len(passages),), start + row))
    preds, target, index = torch.cat(scores), torch.cat(grades), torch.cat(indexes)
    return {
        "ndcg@10": float(RetrievalNormalizedDCG(top_k=10)(preds, target, indexes=index)),
        "mrr@10": float(RetrievalMRR(top_k=10)(preds, target > 0, indexes=index)),
        "recall@100": float(RetrievalRecall(top_k=DEPTH)(preds, target > 0, indexes=index)),
    }
