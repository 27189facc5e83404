"""Which passages are no negatives of a query: those known to answer it, and those that score as if they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ullme.batch import NO_TEXT

ScoreSource = Literal["student", "column", "guide"]


def known_positives(own: Tensor, query_keys: Tensor | None, positive_keys: Tensor, keys: Tensor) -> Tensor:
    """Passages that are known to answer a query: its row's positives and those of rows with the same query, wherever
    their texts stand.

    No shape depends on a value, for which the host would wait.

    Args:
        own: (b,) index of each of this rank's queries among the B of all ranks.
        query_keys: (B,) equal for equal queries; None: every query is another.
        positive_keys: (B, P) keys of each row's positives, :data:`~ullme.batch.NO_TEXT` where it has fewer than P.
        keys: (M,) of the passages of all ranks.

    Returns:
        (b, M) bool.
    """
    ordered, positives = keys.sort().values, positive_keys.flatten()
    # a text's number is the place of its key among the sorted ones, so that equal texts have one
    numbers = torch.searchsorted(ordered, positives)
    exists = (ordered[numbers.clamp(max=len(keys) - 1)] == positives) & (positives != NO_TEXT)
    rows = torch.arange(len(positive_keys), device=keys.device)
    same = rows == own[:, None] if query_keys is None else query_keys == query_keys[own][:, None]
    answers = same[:, :, None].expand(-1, -1, positive_keys.shape[1]).flatten(1) & exists
    # the last column takes what is no answer
    known = torch.zeros((len(own), len(keys) + 1), dtype=torch.bool, device=keys.device)
    known.scatter_(1, torch.where(answers, numbers, len(keys)), True)
    return known.index_select(1, torch.searchsorted(ordered, keys))


def one_place_per_text(known: Tensor, keys: Tensor, own_places: Tensor) -> Tensor:
    """Each known text once: in the first of a query's own places that has it, or else in the first place of all.

    Args:
        known: (b, M) bool, from :func:`known_positives`.
        keys: (M,) of the passages.
        own_places: (b, P) places of the positives of each query's own row among the M, whose texts are known.

    Returns:
        (b, M) bool.
    """
    order = keys.argsort(stable=True)
    first = order[torch.searchsorted(keys[order], keys)]
    own_keys = keys[own_places]
    left_out = (own_keys[:, :, None] == own_keys[:, None, :]).tril(-1).any(2) | (own_keys == NO_TEXT)
    chosen = known & (first == torch.arange(len(keys), device=keys.device))
    chosen = torch.nn.functional.pad(chosen, (0, 1))  # the last column takes what is left out
    chosen.scatter_(1, torch.where(left_out, len(keys), first[own_places]), False)
    chosen.scatter_(1, torch.where(left_out, len(keys), own_places), True)
    return chosen[:, :-1]


def above_margin(scores: Tensor, positive: Tensor, margin: float | None = None, ratio: float | None = None) -> Tensor:
    """Passages that score too high for negatives.

    s⁻ > s⁺ + margin (Qwen3-Embedding, arXiv 2506.05176, with 0.1), or s⁻ > s⁺ − (1 − ratio) |s⁺|, which for s⁺ above 0
    is ratio · s⁺ (NV-Retriever, arXiv 2407.15831, section 4: TopK-PercPos, with 0.95), or either. A missing score (NaN)
    is never too high.

    Args:
        scores: (b, M) of each passage.
        positive: (b,) of each query's positive.
        margin: in units of the score; None for no such limit.
        ratio: of the positive's score; None for no such limit.

    Returns:
        (b, M) bool.
    """
    too_high = torch.zeros_like(scores, dtype=torch.bool)
    if margin is not None:
        too_high |= scores > positive[:, None] + margin
    if ratio is not None:
        # ratio · s⁺ would be above a negative s⁺, as logits and cosines may be
        too_high |= scores > (positive - (1 - ratio) * positive.abs())[:, None]
    return too_high


@dataclass(frozen=True)
class FalseNegatives:
    """Leave out negatives that score higher than a limit that the query's positive sets (:func:`above_margin`).

    Args:
        margin: leave out s⁻ > s⁺ + margin; 0 leaves out all that score above the positive.
        ratio: leave out s⁻ > ratio · s⁺; for a negative s⁺, s⁻ > (2 − ratio) · s⁺.
        scores: where s comes from. ``student``: the cosines of the model that is trained. ``column``: a teacher's, in a
            column of the rows, which limits a query's own hard negatives only. ``guide``: cosines of the LLM with its
            adapters off (as GISTEmbed's guide, arXiv 2402.16829, which has margin 0), one more forward a step.
        column: name of that column.

    Raises:
        ValueError: neither margin nor ratio, one that is out of range, or an unknown source of scores.
    """

    margin: float | None = None
    ratio: float | None = None
    scores: ScoreSource = "student"
    column: str = "score"

    def __post_init__(self) -> None:
        if self.margin is None and self.ratio is None:
            raise ValueError(
                "InfoNCE.false_negatives: give a margin (0.1, say) or a ratio (0.95, say), or leave the option out"
            )
        if self.ratio is not None and not self.ratio > 0:
            raise ValueError(f"InfoNCE.false_negatives.ratio={self.ratio}: must be above 0; 0.95 is usual")
        if self.margin is not None and not -2 <= self.margin < float("inf"):
            raise ValueError(f"InfoNCE.false_negatives.margin={self.margin}: must be a number from -2; 0.1 is usual")
        if self.scores not in get_args(ScoreSource):
            raise ValueError(
                f"InfoNCE.false_negatives.scores={self.scores!r}: choose {' or '.join(get_args(ScoreSource))}"
            )
