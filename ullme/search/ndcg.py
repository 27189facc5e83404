"""nDCG of what was found for judged queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Qrels = Mapping[str, Mapping[str, int]]


def ndcg_at_10(found: Mapping[str, Sequence[str]], qrels: Qrels) -> dict[str, float]:
    """Query id -> nDCG@10 as trec_eval computes it, of every judged query; 0 where nothing was found.

    Args:
        found: query id -> document ids, the best first.
        qrels: query id -> document id -> relevance grade.
    """
    import pytrec_eval

    run = {query: {document: float(-rank) for rank, document in enumerate(found.get(query, ()))} for query in qrels}
    judged = {query: dict(grades) for query, grades in qrels.items()}
    scores = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run)
    return {query: scores.get(query, {}).get("ndcg_cut_10", 0.0) for query in qrels}
