"""The weight of dense search in fusion, chosen on judged queries and kept beside the shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ullme.search import index_files
from ullme.search.fusion import Fusion, fuse
from ullme.search.ndcg import Qrels, ndcg_at_10
from ullme.search.own_copies import find_own_copies
from ullme.search.queries import check_judged_queries
from ullme.search.shards import Shards

if TYPE_CHECKING:
    from ullme.search.searcher import Searcher

FOLDER = "fusion"
# Without judged queries both rankings count alike.
DEFAULT = 0.5
CANDIDATES = tuple(n / 10 for n in range(11))


@dataclass(frozen=True)
class FusionWeight:
    """What was chosen, and on what.

    Args:
        weight: of dense search, from 0 (BM25 alone) to 1 (dense search alone).
        scores: weight -> mean nDCG@10 in [0, 1], of each that was tried.
        queries: how many were judged.
    """

    weight: float
    scores: Mapping[float, float]
    queries: int

    def __str__(self) -> str:
        tried = ", ".join(f"{weight:g}: {100 * score:.1f}" for weight, score in self.scores.items())
        return f"dense weight {self.weight:g}, by nDCG@10 of {self.queries} judged queries ({tried})"


def choose_weights(searcher: Searcher, queries: Mapping[str, str], qrels: Qrels) -> dict[Fusion, FusionWeight]:
    """For each kind of fusion the weight of the best mean nDCG@10, of :data:`CANDIDATES`; of equal ones the nearest to
    equal weights.

    Both ends are among them, so on these queries fusion is never worse than the better of dense search and BM25.

    Args, Raises: as :func:`ndcg_by_weight`.
    """
    chosen = {}
    for how, found in ndcg_by_weight(searcher, queries, qrels).items():
        means = {weight: sum(scores.values()) / len(scores) for weight, scores in found.items()}
        chosen[how] = FusionWeight(best_weight(means), means, len(found[DEFAULT]))
    return chosen


def best_weight(scores: Mapping[float, float]) -> float:
    """The weight of the best score in [0, 1]; of equal ones the nearest to equal weights.

    Args:
        scores: weight -> mean nDCG@10.
    """
    return max(scores, key=lambda weight: (round(scores[weight], 6), -abs(weight - DEFAULT)))


def ndcg_by_weight(
    searcher: Searcher, queries: Mapping[str, str], qrels: Qrels
) -> dict[Fusion, dict[float, dict[str, float]]]:
    """For each kind of fusion and each weight of :data:`CANDIDATES`, query id -> nDCG@10 in [0, 1].

    Args:
        searcher: of a folder with a BM25 index.
        queries: query id -> text.
        qrels: query id -> document id -> relevance grade. Queries without a judgement on a document of the folder are
            left out.

    Raises:
        ValueError: no BM25 index, or judgements on queries that are not there or on no document of the folder.
    """
    check_judged_queries(qrels, queries, "--qrels", "--queries")
    qrels, _ = on_known_documents(searcher.shards, qrels)
    names = list(qrels)
    unjudged = {name: queries[name] for name in names if qrels[name].get(name, 0) <= 0}
    copies = find_own_copies(searcher.shards, unjudged)
    dense, words = searcher.rankings([queries[name] for name in names])

    def scores(weight: float, how: Fusion) -> dict[str, float]:
        _, rows = fuse(dense, words, 10 + bool(copies), weight, how)
        ids = [searcher.shards.ids(own[own >= 0]) for own in rows]
        found = {
            name: [key for key in own if key != name or name not in copies]
            for name, own in zip(names, ids, strict=True)
        }
        return ndcg_at_10(found, qrels)

    return {how: {weight: scores(weight, how) for weight in CANDIDATES} for how in get_args(Fusion)}


def on_known_documents(shards: Shards, qrels: Qrels) -> tuple[dict[str, dict[str, int]], int]:
    """The judgements on documents of the folder, without queries that have none, and how many were left out.

    Raises:
        ValueError: no judgement is left.
    """
    judged = {document for grades in qrels.values() for document in grades}
    known = {key for key in shards.all_ids() if key in judged}
    if not known:
        raise ValueError(
            f"--qrels judges no document of {shards.folder}, but such as {sorted(judged)[:3]}; give judgements on "
            "the ids of its corpus"
        )
    found = {query: {key: grade for key, grade in own.items() if key in known} for query, own in qrels.items()}
    left_out = sum(len(own) for own in qrels.values()) - sum(len(own) for own in found.values())
    return {query: own for query, own in found.items() if own}, left_out


def write_weights(shards: Shards, chosen: Mapping[Fusion, FusionWeight]) -> None:
    """Make them the folder's defaults. Raises: StorageError: they cannot be written."""
    description = {
        how: {
            "dense_weight": one.weight,
            "ndcg_at_10": {f"{weight:g}": score for weight, score in one.scores.items()},
            "queries": one.queries,
        }
        for how, one in chosen.items()
    }
    index_files.write_index(shards, FOLDER, lambda folder: {"fusion": description})


def read_weight(shards: Shards, how: Fusion) -> float | None:
    """The folder's default; None if none was chosen. Raises: ValueError: it was chosen for other shards."""
    description = index_files.read_description(shards, FOLDER)
    return None if description is None else float(description["fusion"][how]["dense_weight"])
