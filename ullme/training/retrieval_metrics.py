"""Retrieval scores of embeddings that are already in memory, with torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 100


def retrieval_metrics(queries: Tensor, corpus: Tensor, relevant: list[dict[int, int]]) -> dict[str, float]:
    """nDCG@10, MRR@10 and Recall@100, means over queries.

    Args:
        queries: (Q, D) of unit length.
        corpus: (P, D) of unit length.
        relevant: for each query, position in the corpus -> grade (0 is not relevant).

    Returns:
        ``ndcg@10``, ``mrr@10``, ``recall@100``, from 0 to 1.
    """
    from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

    scores, grades, indexes = [], [], []
    for start in range(0, len(queries), 256):
        block = queries[start : start + 256].float() @ corpus.float().T
        top = block.topk(min(DEPTH, len(corpus)), dim=1).indices
        for row, found in enumerate(top):
            known = relevant[start + row]
            # Every relevant passage takes part, found or not: recall and the ideal ranking count them all.
            rest = [p for p in known if known[p] > 0 and p not in set(found.tolist())]
            places = torch.cat([found, torch.tensor(rest, dtype=torch.long, device=found.device)])
            scores.append(block[row, places].cpu())
            grades.append(torch.tensor([max(known.get(int(p), 0), 0) for p in places]))
            indexes.append(torch.full((len(places),), start + row))
    preds, target, index = torch.cat(scores), torch.cat(grades), torch.cat(indexes)
    return {
        "ndcg@10": float(RetrievalNormalizedDCG(top_k=10)(preds, target, indexes=index)),
        "mrr@10": float(RetrievalMRR(top_k=10)(preds, target > 0, indexes=index)),
        "recall@100": float(RetrievalRecall(top_k=DEPTH)(preds, target > 0, indexes=index)),
    }
