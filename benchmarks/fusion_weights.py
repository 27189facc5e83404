"""What the weight of dense search in fusion is worth, as in the table of docs/search.md.

    ullme encode --model MODEL --corpus COLLECTION --to EMBEDDINGS
    ullme index EMBEDDINGS --factory none --bm25
    python benchmarks/fusion_weights.py EMBEDDINGS... --collection COLLECTION [--tuning 50] [--draws 50]

``COLLECTION`` is a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv). Prints nDCG@10 of dense search,
of BM25 and of their fusion at several weights. For each kind of fusion also what a tuned weight gives: of each random
draw at most half of the queries, and at most ``--tuning``, choose it as ``ullme index --qrels`` does; the others say
how far that fusion is above the better of dense search and BM25.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ullme.data.beir import read_qrels
from ullme.search.fusion_weight import best_weight, ndcg_by_weight
from ullme.search.queries import read_queries
from ullme.search.searcher import Searcher

ALONE = {"dense": 1.0, "BM25": 0.0}
SHOWN = (0.5, 0.3)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", nargs="+", type=Path, metavar="EMBEDDINGS", help="folders of `ullme encode`")
    parser.add_argument("--collection", type=Path, required=True, help="whose documents they are, in BEIR layout")
    parser.add_argument("--split", default="test", help="of its judgements")
    parser.add_argument("--tuning", type=int, default=50, help="judged queries that choose the weight, at most")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def tuned_gains(scores: Mapping[float, np.ndarray], tuning: int, draws: int, seed: int) -> np.ndarray:
    """(draws,) nDCG@10 of the tuned fusion less that of the better of dense search and BM25, on the other queries.

    Args:
        scores: weight -> (Q,) nDCG@10 of each query.
        tuning: queries that choose the weight, at most; never more than half of them.
        draws: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    number = len(scores[ALONE["dense"]])
    gains = np.empty(draws)
    for draw in range(draws):
        order = rng.permutation(number)
        chosen, others = np.split(order, [min(number // 2, tuning)])
        weight = best_weight({weight: float(own[chosen].mean()) for weight, own in scores.items()})
        gains[draw] = scores[weight][others].mean() - max(scores[w][others].mean() for w in ALONE.values())
    return gains


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    queries = read_queries(options.collection / "queries.jsonl")
    qrels = read_qrels(options.collection / "qrels" / f"{options.split}.tsv")
    for folder in options.embeddings:
        found = {
            how: {weight: 100 * np.array(list(scores.values())) for weight, scores in by_weight.items()}
            for how, by_weight in ndcg_by_weight(Searcher(folder), queries, qrels).items()
        }
        alone = ", ".join(f"{name} {found['scores'][weight].mean():.1f}" for name, weight in ALONE.items())
        print(f"{folder}: {len(found['scores'][1.0])} queries; {alone}")
        for how, scores in found.items():
            gains = tuned_gains(scores, options.tuning, options.draws, options.seed)
            means = ", ".join(f"{weight:g}: {scores[weight].mean():.1f}" for weight in SHOWN)
            print(f"    {how} {means}; tuned {gains.mean():+.1f}, in the worst draw {gains.min():+.1f}", flush=True)


if __name__ == "__main__":
    main()
