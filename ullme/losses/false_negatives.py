"""Which passages are no negatives of a query: those known to answer it, and those that score as if they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ullme.batch import NO_TEXT

ScoreSource = Literal["student", "column", "guide"]


def known_positives(own: Tensor, query_keys: Tensor | None, positive_keys: Tensor) -> Tensor:
    """Keys of the passages that are known to answer each query: its positives, and those of rows with the same query.

    Args:
        own: (b,) index of each of this rank's queries among the B of all ranks.
        query_keys: (B,) equal for equal queries; None: every query is another.
        positive_keys: (B, P) keys of each row's positives, :data:`~ullme.batch.NO_TEXT` where it has fewer than P.

    Returns:
        (b, K) with each row's own positive first; it stands in where a query has fewer than K.
    """
    known = positive_keys[own]
    mine = known[:, :1]
    if query_keys is not None:
        same = query_keys == query_keys[own][:, None]
        order = same.int().topk(int(same.sum(1).max()), dim=1).indices
        of_siblings = torch.where(same.gather(1, order)[..., None], positive_keys[order], mine[..., None])
        known = torch.cat([known, of_siblings.flatten(1)], dim=1)
    return torch.where(known == NO_TEXT, mine, known)


def among(keys: Tensor, wanted: Tensor) -> Tensor:
    """(b, M) bool: which of M keys are one of the K of each query.

    Args:
        keys: (M,).
        wanted: (b, K).
    """
    found = torch.zeros((len(wanted), len(keys)), dtype=torch.bool, device=keys.device)
    for column in wanted.unbind(1):
        found |= keys == column[:, None]
    return found


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
