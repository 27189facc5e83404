"""Losses on pairs of texts with a score of their similarity, as semantic textual similarity (STS) has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ullme.batch import ColumnKind, Representations
from ullme.distributed import gather_messages, gather_sizes
from ullme.losses.base import RepresentationLoss, check_positive
from ullme.losses.distillation import mean_of_scored


def cosent(cosines: Tensor, scores: Tensor, temperature: float = 0.05) -> Tensor:
    """log(1 + Σ exp((cos_j − cos_i) / τ)) over the pairs i, j with score_i > score_j.

    CoSENT (doi 10.1109/TASLP.2024.3402087; AnglE, arXiv 2309.12871).

    Args:
        cosines: (B,) of each pair of texts.
        scores: (B,) of each pair, in any unit: only their order counts. NaN leaves a pair out.
        temperature: τ.

    Returns:
        A scalar in nats.
    """
    scaled = cosines / temperature
    differences = scaled[None, :] - scaled[:, None]
    ordered = scores[:, None] > scores[None, :]  # never with a NaN
    flat = differences.masked_fill(~ordered, float("-inf")).flatten()
    return torch.cat([flat.new_zeros(1), flat]).logsumexp(0)


def cosine_regression(cosines: Tensor, targets: Tensor) -> Tensor:
    """(cos − target)² (Sentence-BERT, arXiv 1908.10084, section 3, regression objective).

    Args:
        cosines: (B,) of each pair of texts.
        targets: (B,) from −1 to 1, NaN where there is none.

    Returns:
        (B,), 0 where there is no target.
    """
    return torch.where(targets.isnan(), 0, cosines - targets.nan_to_num()).square()


class ScoredPairs(RepresentationLoss):
    """Base of the losses on the cosine of a query with its first candidate, and a score, one a query.

    Args:
        column: of the scores.
        weight: λ.
    """

    needs_positive = False

    def __init__(self, column: str = "score", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.columns = (column,)
        self.column = column

    def check_columns(self, kinds: Mapping[str, ColumnKind], num_hard_negatives: int) -> None:
        if kinds[self.column] == "candidate" and num_hard_negatives > 0:
            raise ValueError(
                f"{type(self).__name__}.column={self.column!r} has one number a candidate, and this loss compares "
                "pairs of texts; take DistillationKL for scored lists, or rows of sentence1, sentence2 and score"
            )

    def pairs(self, reps: Representations) -> tuple[Tensor, Tensor]:
        """(B,) cosines and (B,) scores.

        Raises:
            ValueError: the column has one number a candidate, and there are several.
        """
        scores = reps.columns[self.column]
        if scores.dim() == 2:
            self.check_columns({self.column: "candidate"}, scores.shape[1] - 1)
            scores = scores[:, 0]
        wide = torch.promote_types(reps.queries.dtype, torch.float32)
        with torch.autocast(reps.queries.device.type, enabled=False):
            return (reps.queries.to(wide) * reps.passages[:, 0].to(wide)).sum(1), scores


class CoSENT(ScoredPairs):
    """:func:`cosent` over all pairs of the global batch.

    Args:
        temperature: τ; sentence-transformers' scale of 20 is 0.05.
        column: of the scores, one a query, in any unit.
        weight: λ.

    Raises:
        ValueError: a temperature that is not positive.
    """

    name = "cosent"

    def __init__(self, temperature: float = 0.05, column: str = "score", weight: float = 1.0) -> None:
        super().__init__(column, weight)
        check_positive(self, "temperature", temperature)
        self.temperature = temperature

    def forward(self, reps: Representations) -> Tensor:
        """The same on every rank: the loss of the global batch, which is not a mean over queries."""
        whole = reps.gather(gather_sizes(len(reps), reps.queries.device))
        return cosent(*self.pairs(whole), self.temperature)


class CosineRegression(ScoredPairs):
    """:func:`cosine_regression`, the mean over the scored pairs of the global batch.

    Args:
        column: of the scores, one a query.
        lowest: score of a pair whose cosine shall be 0.
        highest: score of a pair whose cosine shall be 1; 5 for STSBenchmark.
        weight: λ.

    Raises:
        ValueError: ``highest`` not above ``lowest``.
    """

    name = "cosine_regression"

    def __init__(self, column: str = "score", lowest: float = 0.0, highest: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(column, weight)
        if not highest > lowest:
            raise ValueError(f"CosineRegression.highest={highest} must be above lowest={lowest}")
        self.lowest, self.highest = lowest, highest

    def forward(self, reps: Representations) -> Tensor:
        """Raises: ValueError, on every rank: a score whose target no cosine can reach."""
        cosines, scores = self.pairs(reps)
        targets = (scores - self.lowest) / (self.highest - self.lowest)
        outside = bool((targets.abs() > 1 + 1e-6).any())
        worst = f"{scores[targets.abs().nan_to_num().argmax()].item():g}" if outside else None
        if found := gather_messages(worst, cosines.device):
            raise ValueError(
                f"CosineRegression: the score {next(iter(found.values()))} is outside of lowest={self.lowest:g} and "
                f"highest={self.highest:g}, so no cosine can reach it; set them to the range of the scores"
            )
        return mean_of_scored(cosine_regression(cosines, targets), ~targets.isnan())
