"""Which of the documents that are found for a query are taken for its hard negatives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

Sampling = Literal["top", "random"]
MiningMethod = Literal["dense", "bm25"]


@dataclass(frozen=True)
class MiningSettings:
    """Which negatives a query gets.

    Scores are those of the search: inner products of embeddings (cosines, of most models), or BM25. The lowest score
    of a known positive of the query is what the margins compare with. The same settings give the same negatives as
    sentence-transformers' ``mine_hard_negatives``; its documents are the positives of all rows beside the corpus, here
    the corpus alone.

    Args:
        num_negatives: of each query, at the most.
        range_min: leave out so many of the best, of those that the margins and scores leave.
        range_max: look at the first so many; None: ``range_min`` and ``num_negatives``, ten times these where margins
            or scores leave some out or negatives are drawn, and as many as the query with most positives has.
        relative_margin: m keeps a negative whose score is at most s⁺ − m |s⁺|, where s⁺ is the positive's; 0.05 is
            TopK-PercPos with 95 % (NV-Retriever, arXiv 2407.15831, section 3.3).
        absolute_margin: m keeps a negative whose score is at most s⁺ − m (TopK-MarginPos there).
        max_score: the highest score of a negative (TopK-Abs there).
        min_score: the lowest.
        sampling: ``top`` takes the best that are left, ``random`` draws among them.
        seed: of the draws. What is drawn for a query depends on the seed, its text and what was found for it.
        likelihood_margin: drop a negative n with log π(q|n) > log π(q|p) − m, in nats a token of the query, where p is
            its least likely known positive and π the pre-trained LLM; None drops none.
    """

    num_negatives: int = 8
    range_min: int = 0
    range_max: int | None = None
    relative_margin: float | None = None
    absolute_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling: Sampling = "top"
    seed: int = 0
    likelihood_margin: float | None = None

    @property
    def has_margins(self) -> bool:
        """Whether a negative is compared with a positive's score."""
        return self.relative_margin is not None or self.absolute_margin is not None

    def check(self) -> None:
        """Raises: ValueError: a value out of range."""
        if self.num_negatives < 1:
            raise ValueError(f"--num_negatives {self.num_negatives} must be at least 1")
        for name in ("range_min", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        if self.range_max is not None and self.range_max - self.range_min < self.num_negatives:
            raise ValueError(
                f"--num_negatives {self.num_negatives}: --range_min {self.range_min} and --range_max {self.range_max} "
                f"leave {max(0, self.range_max - self.range_min)} documents for a query; widen the range, or ask for "
                "fewer negatives"
            )
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"--sampling {self.sampling}: choose {' or '.join(get_args(Sampling))}")
        for name in ("relative_margin", "absolute_margin", "max_score", "min_score", "likelihood_margin"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value):
                raise ValueError(f"--{name} {value} must be a number; leave it out for none")
        if self.relative_margin is not None and not 0 <= self.relative_margin <= 1:
            raise ValueError(
                f"--relative_margin {self.relative_margin}: give a share of the positive's score from 0 to 1; 0.05 "
                "keeps negatives up to 95 % of it"
            )
        if self.absolute_margin is not None and self.absolute_margin < 0:
            raise ValueError(
                f"--absolute_margin {self.absolute_margin} would keep negatives above the positive; give 0 or more"
            )
        if None not in (self.max_score, self.min_score) and self.min_score > self.max_score:  # type: ignore[operator]
            raise ValueError(f"--min_score {self.min_score} is above --max_score {self.max_score}; no score is between")

    def check_unlabelled(self) -> None:
        """Raises: ValueError: an option that needs positives, of which queries without labels have none."""
        for name in ("relative_margin", "absolute_margin", "likelihood_margin"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"--{name} {value} compares with a query's positive, and --queries have none; give --rows, or "
                    "--max_score"
                )

    def check_corpus(self, documents: int, name: str, positives: int = 0) -> None:
        """Raises: ValueError: a query cannot have so many negatives, whatever is found for it."""
        if self.num_negatives + self.range_min > documents - min(positives, 1):
            kept = " beside a positive" if positives else ""
            left_out = f" after --range_min {self.range_min}" if self.range_min else ""
            raise ValueError(
                f"--num_negatives {self.num_negatives}: {name} has {documents} documents, too few for so many"
                f"{left_out}{kept}; ask for fewer, or give a larger corpus"
            )

    def depth(self, positives: int) -> tuple[int, int]:
        """How many documents a query's negatives are among, and how many are looked at to find them.

        Args:
            positives: of the query with most.
        """
        last = self.range_max
        if last is None:
            chosen = self.has_margins or self.max_score is not None or self.sampling == "random"
            chosen = chosen or self.likelihood_margin is not None
            last = self.range_min + self.num_negatives * (10 if chosen else 1) + positives
        return last, last + positives

    def window(self, scores: np.ndarray, positive: float | None, last: int) -> np.ndarray:
        """Places of a query's possible negatives, the best first.

        Args:
            scores: (n,) float32 of documents that are no positives, in decreasing order.
            positive: the lowest score of a positive, or None.
            last: see :meth:`depth`.
        """
        keep = np.isfinite(scores)
        if positive is not None:
            known = np.float32(positive)
            if self.absolute_margin is not None:
                keep &= ~(scores + np.float32(self.absolute_margin) > known)
            if self.relative_margin is not None:
                keep &= ~(scores > known - abs(known) * np.float32(self.relative_margin))
        if self.max_score is not None:
            keep &= ~(scores > np.float32(self.max_score))
        if self.min_score is not None:
            keep &= ~(scores < np.float32(self.min_score))
        return np.flatnonzero(keep)[self.range_min : last]

    def order(self, places: np.ndarray, query_hash: int) -> np.ndarray:
        """The places in the order in which they are taken."""
        if self.sampling == "top":
            return places
        return np.random.default_rng([self.seed, query_hash]).permutation(places)

    def to_dict(self) -> dict[str, Any]:
        """JSON; which negatives are mined depends on each of them."""
        return asdict(self)


def check_method(method: str) -> None:
    """Raises: ValueError: it is none."""
    if method not in get_args(MiningMethod):
        raise ValueError(f"--method {method}: choose {' or '.join(get_args(MiningMethod))}")
