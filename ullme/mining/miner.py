"""Mine hard negatives for training rows, or candidates for queries without labels, from a corpus.

Rows are mined in blocks: a block's queries are searched together, streaming over the vectors of the corpus, so memory
depends neither on the number of documents nor on that of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ullme.data.beir import is_copy
from ullme.mining.parts import OnFewer, Parts, Written, check_on_fewer
from ullme.mining.retrievers import Question, Retriever
from ullme.mining.rows import MiningRow, MiningRows
from ullme.mining.settings import MiningSettings
from ullme.mining.text_hashes import TextHashes, hashes_of, text_hash
from ullme.search.corpus import Document
from ullme.utils.progress import progress

# Rows whose queries are searched together, and whose negatives are a part of the file: each block reads the vectors of
# the whole corpus once, so that blocks are large where that takes long.
SMALL_BLOCK, LARGE_BLOCK = 512, 4096

# n pairs of query and passage -> (n,) log π(query | passage), in nats a token of the query.
QueryLikelihood = Callable[[Sequence[tuple[str, str]]], np.ndarray]


class Candidates(NamedTuple):
    """What was found for one query that is no known positive, each text once.

    Args:
        scores: (n,) float32 in decreasing order.
        rows: (n,) int64 documents.
        positives: (p,) float32 scores of its known positives, in their order; NaN where there is no saying.
        positive_ids: (p,) ids of the documents that they are; None for none.
    """

    scores: np.ndarray
    rows: np.ndarray
    positives: np.ndarray
    positive_ids: list[str | None]


class Chosen(NamedTuple):
    """The negatives of one query.

    Args:
        places: among its candidates, in the order in which they are taken.
        likelihoods: (n,) mean log π(q|n), or None.
        positives: (p,) mean log π(q|p) of its known positives, or None.
    """

    places: list[int]
    likelihoods: list[float] | None = None
    positives: np.ndarray | None = None


def mine(
    rows: MiningRows,
    retriever: Retriever,
    file: str | Path,
    settings: MiningSettings | None = None,
    *,
    query_likelihood: QueryLikelihood | None = None,
    likelihood_name: str | None = None,
    on_fewer: OnFewer = "keep",
    block_rows: int | None = None,
) -> Written:
    """Mine negatives and write them as training rows; the same call again does what is missing.

    Labelled rows get ``query``, ``pos``, ``neg``, ``pos_scores``, ``neg_scores``, ``pos_ids`` and ``neg_ids`` (the
    ids of the documents, null for a positive that is none), and ``prompt`` where the row has an instruction. Queries
    without labels get ``query``, ``candidates``, ``scores`` and ``candidate_ids``, and their own ``_id``. A negative is
    never a known positive of its query, over all rows, nor a copy of one, of another negative or of the query; nor a
    document that is a positive with a title in front, where the positive itself is no document.

    Args:
        rows: to mine for.
        retriever: of the documents.
        file: .jsonl to write; its parts stay in ``FILE.parts``.
        settings: which negatives.
        query_likelihood: of the pre-trained LLM; rows get ``pos_likelihoods`` and ``neg_likelihoods`` (or
            ``likelihoods``) with it. Needed for ``settings.likelihood_margin``.
        likelihood_name: changes with whatever changes ``query_likelihood``.
        on_fewer: a row that gets fewer negatives than asked for is written with them (``keep``), left out (``skip``),
            or an error (``stop``). A query without labels needs two candidates at least.
        block_rows: rows whose queries are searched together; None: 512 to 4,096, more with more documents.

    Raises:
        ValueError: a value out of range, a file or parts of another command, or a disk that cannot be written.
    """
    settings = settings or MiningSettings()
    if block_rows is None:
        block_rows = _usual_block(retriever, query_likelihood is not None)
    _check(settings, rows, retriever, query_likelihood, on_fewer, block_rows)
    parts = Parts(file)
    parts.check(
        {
            "rows": rows.digest,
            "labelled": rows.labelled,
            "documents": retriever.shards.digest,
            "method": retriever.name,
            **{f"the {name}": value for name, value in retriever.identity().items()},
            **{f"--{name}": value for name, value in settings.to_dict().items()},
            "the LLM of likelihoods": likelihood_name,
            "--block_rows": block_rows,
        }
    )
    hashes = TextHashes(retriever.shards, parts.folder / f"hashes-{retriever.shards.digest[:8]}")
    outside = int((hashes.find_hashes(rows.positive_hashes) < 0).sum())
    if outside and settings.has_margins and not retriever.scores_all:
        raise ValueError(
            f"{outside} of {len(rows.positive_hashes)} positives of {rows.name} are not in the corpus, and BM25 scores "
            "documents only, so --relative_margin and --absolute_margin have nothing to compare with; add them to the "
            "corpus, leave the margins out, or mine with a model"
        )
    miner = _Miner(rows, retriever, settings, hashes, query_likelihood)
    blocks = [range(low, min(low + block_rows, len(rows))) for low in range(0, len(rows), block_rows)]
    with progress("mine", total=len(rows), unit="row") as bar:
        for number, block in enumerate(blocks):
            if not parts.has(number):
                parts.write(number, miner.mine([rows[row] for row in block]))
            bar.update(len(block))
    field, least = ("neg", 0) if rows.labelled else ("candidates", 2)
    written = parts.finish(len(blocks), settings.num_negatives, field, least, on_fewer)
    written.outside = outside
    return written


def _usual_block(retriever: Retriever, likelihoods: bool) -> int:
    if retriever.name != "dense" or likelihoods:  # the search is no faster, or not what takes long
        return SMALL_BLOCK
    return min(max(SMALL_BLOCK, len(retriever.shards) // 16), LARGE_BLOCK)


def _check(
    settings: MiningSettings,
    rows: MiningRows,
    retriever: Retriever,
    query_likelihood: QueryLikelihood | None,
    on_fewer: str,
    block_rows: int,
) -> None:
    """Raises: ValueError: a mistake that can be found before anything is searched."""
    settings.check()
    check_on_fewer(on_fewer)
    if block_rows < 1:
        raise ValueError(f"--block_rows {block_rows} must be at least 1")
    if not rows.labelled:
        settings.check_unlabelled()
        if settings.num_negatives < 2:
            raise ValueError(
                "--num_negatives 1: candidates of a query without labels are compared with one another; give 2 or more"
            )
    settings.check_corpus(len(retriever.shards), str(retriever.shards.folder), rows.most_positives)
    if settings.likelihood_margin is not None and query_likelihood is None:
        raise ValueError("--likelihood_margin needs an LLM; name it with --likelihood")


class _Miner:
    """Mines block by block; see :func:`mine`."""

    def __init__(
        self,
        rows: MiningRows,
        retriever: Retriever,
        settings: MiningSettings,
        hashes: TextHashes,
        query_likelihood: QueryLikelihood | None,
    ) -> None:
        self.retriever, self.settings, self.hashes = retriever, settings, hashes
        self.labelled = rows.labelled
        self.query_likelihood = query_likelihood
        self.last, self.depth = settings.depth(rows.most_positives)

    def mine(self, block: Sequence[MiningRow]) -> list[dict[str, Any]]:
        """The lines of a block of rows. Rows with one query have one search and the same negatives."""
        first: dict[tuple[str, str | None], MiningRow] = {}
        for row in block:
            first.setdefault((row.query, row.instruction), row)
        queries = list(first.values())
        questions = self._questions(queries)
        candidates = self._candidates(questions)
        outside = [
            [text for text, place in zip(question.positives, question.rows, strict=True) if place < 0]
            for question in questions
        ]
        wanted = [self.settings.num_negatives + len(own) for own in outside]
        chosen = self._choose(queries, candidates, wanted)
        rows = [found.rows[choice.places] for found, choice in zip(candidates, chosen, strict=True)]
        documents = self.retriever.shards.documents(np.concatenate(rows))
        ends = np.cumsum(list(map(len, rows))).tolist()
        negatives = [documents[low:high] for low, high in zip([0, *ends], ends, strict=False)]
        for n, own in enumerate(outside):
            chosen[n], negatives[n] = _kept(chosen[n], negatives[n], own, self.settings.num_negatives)
        line = _labelled_line if self.labelled else _unlabelled_line
        of = dict(zip(first, zip(candidates, chosen, negatives, strict=True), strict=True))
        return [line(row, *of[row.query, row.instruction]) for row in block]

    def _questions(self, queries: Sequence[MiningRow]) -> list[Question]:
        places = iter(self.hashes.find([text for row in queries for text in row.known]).tolist())
        return [
            Question(row.query, list(row.known), [next(places) for _ in row.known], row.instruction) for row in queries
        ]

    def _candidates(self, questions: Sequence[Question]) -> list[Candidates]:
        """The first documents of each query, without its positives and copies."""
        found: dict[int, Candidates] = {}
        known = sorted({row for question in questions for row in question.rows} - {-1})
        ids: dict[int, str | None] = {-1: None, **dict(zip(known, self.retriever.shards.ids(known), strict=True))}
        missing, k = list(range(len(questions))), min(self.depth, len(self.retriever.shards))
        while missing:
            answers = self.retriever.find([questions[n] for n in missing], k)
            again = []
            for place, n in enumerate(missing):
                rows = answers.rows[place][answers.rows[place] >= 0]
                hashes = self.hashes[rows]
                first = np.sort(np.unique(hashes, return_index=True)[1])  # of each text, in the order of the scores
                first = first[hashes[first] != text_hash(questions[n].query)]  # a copy of the query answers nothing
                if len(first) < self.depth and len(rows) == k < len(self.retriever.shards):
                    again.append(n)  # copies took the room of other documents
                    continue
                first = first[: self.depth]
                first = first[~np.isin(hashes[first], hashes_of(questions[n].positives))]
                scores, positives = answers.scores[place][first], answers.positives[place]
                found[n] = Candidates(scores, rows[first], positives, [ids[row] for row in questions[n].rows])
            missing, k = again, min(2 * k, len(self.retriever.shards))
        return [found[n] for n in range(len(questions))]

    def _choose(
        self, block: Sequence[MiningRow], candidates: Sequence[Candidates], wanted: Sequence[int]
    ) -> list[Chosen]:
        """As many candidates of each query as are wanted, or all that the settings allow."""
        orders = []
        for row, found in zip(block, candidates, strict=True):
            known = found.positives[~np.isnan(found.positives)]
            places = self.settings.window(found.scores, known.min() if len(known) else None, self.last)
            orders.append(self.settings.order(places, text_hash(row.query)).tolist())
        if self.query_likelihood is None:
            return [Chosen(order[:count]) for order, count in zip(orders, wanted, strict=True)]
        return self._choose_by_likelihood(block, candidates, orders, wanted)

    def _choose_by_likelihood(
        self,
        block: Sequence[MiningRow],
        candidates: Sequence[Candidates],
        orders: list[list[int]],
        wanted: Sequence[int],
    ) -> list[Chosen]:
        """Score as many candidates as are still missing, drop what is too likely, and so on with the next ones."""
        assert self.query_likelihood is not None
        known = [(row.query, text) for row in block for text in row.known]
        scored = self.query_likelihood(known) if known else np.empty(0)
        positives = self._split(scored, [len(row.known) for row in block])
        margin = self.settings.likelihood_margin
        limits = [np.inf if margin is None else own.min() - margin for own in positives]
        taken: list[dict[int, float]] = [{} for _ in block]
        while True:
            asked = [
                [order.pop(0) for _ in range(min(len(order), count - len(have)))]
                for order, have, count in zip(orders, taken, wanted, strict=True)
            ]
            if not any(asked):
                break
            rows = np.concatenate([found.rows[places] for found, places in zip(candidates, asked, strict=True)])
            texts = [document.text for document in self.retriever.shards.documents(rows)]
            queries = [row.query for row, places in zip(block, asked, strict=True) for _ in places]
            logps = self._split(self.query_likelihood(list(zip(queries, texts, strict=True))), list(map(len, asked)))
            for have, places, own, limit in zip(taken, asked, logps, limits, strict=True):
                have.update({p: v for p, v in zip(places, own.tolist(), strict=True) if v <= limit})
        return [Chosen(list(have), list(have.values()), own) for have, own in zip(taken, positives, strict=True)]

    @staticmethod
    def _split(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        return np.split(values, np.cumsum(counts)[:-1])


def _kept(
    choice: Chosen, negatives: Sequence[Document], outside: Sequence[str], count: int
) -> tuple[Chosen, list[Document]]:
    """The first ``count`` negatives that are no positive with a title in front, in decreasing order of their scores.

    Args:
        choice: in the order in which they are taken.
        negatives: the documents.
        outside: positives of the query that are no documents as they are.
        count: how many.
    """
    taken = [n for n, document in enumerate(negatives) if not any(_is_titled(text, document.text) for text in outside)]
    order = sorted(taken[:count], key=choice.places.__getitem__)
    likelihoods = None if choice.likelihoods is None else [choice.likelihoods[n] for n in order]
    kept = choice._replace(places=[choice.places[n] for n in order], likelihoods=likelihoods)
    return kept, [negatives[n] for n in order]


def _is_titled(text: str, document: str) -> bool:
    """Whether a document is a text with a title in front, which is no longer than the text."""
    return len(document) <= 2 * len(text) + 1 and is_copy(text, document)


def _labelled_line(row: MiningRow, found: Candidates, choice: Chosen, negatives: Sequence[Document]) -> dict[str, Any]:
    own = [row.known.index(text) for text in row.positives]
    line: dict[str, Any] = {
        "query": row.query,
        "pos": list(row.positives),
        "neg": [document.text for document in negatives],
        "pos_scores": _numbers(found.positives[own]),
        "neg_scores": _numbers(found.scores[choice.places]),
        "pos_ids": [found.positive_ids[place] for place in own],
        "neg_ids": [document.id for document in negatives],
    }
    if choice.positives is not None:
        line["pos_likelihoods"] = _numbers(choice.positives[own])
        line["neg_likelihoods"] = _numbers(choice.likelihoods)
    if row.instruction is not None:
        line["prompt"] = row.instruction
    return line


def _unlabelled_line(
    row: MiningRow, found: Candidates, choice: Chosen, negatives: Sequence[Document]
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "_id": row.id,
        "query": row.query,
        "candidates": [document.text for document in negatives],
        "scores": _numbers(found.scores[choice.places]),
        "candidate_ids": [document.id for document in negatives],
    }
    if choice.likelihoods is not None:
        line["likelihoods"] = _numbers(choice.likelihoods)
    return line


def _numbers(values: Any) -> list[float | None]:
    """Numbers for JSON: six digits behind the point, null for NaN."""
    return [None if np.isnan(value) else round(float(value), 6) for value in values]
