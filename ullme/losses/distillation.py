"""Losses that teach the embedder a teacher's scores of each query's candidates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ullme.batch import ColumnKind, Representations
from ullme.distributed import gather_sizes, world
from ullme.losses.base import RepresentationLoss, RowNumbers, check_positive

# A teacher that gives so much to one candidate, for so many of the queries, says no more than a label does.
_ONE_HOT, _NEARLY_ALL = 0.99, 0.9


def distillation_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, teacher_temperature: float | None = None
) -> Tensor:
    """T² Σ P_t log(P_t / P_s), with P the softmax of the scores over T of the candidates that the teacher scored.

    Knowledge distillation (arXiv 1503.02531, section 2, with its factor T²) over a list of passages (arXiv 2010.10999),
    as sentence-transformers' DistillKLDivLoss.

    Args:
        student: (B, C) scores.
        teacher: (B, C) scores, NaN where there is none.
        temperature: T.
        teacher_temperature: divides the teacher's scores instead of T; None: T.

    Returns:
        (B,) in nats; 0 for a query with fewer than two scores.
    """
    known = ~teacher.isnan()
    scored = known.sum(1) > 1
    usable = known | ~scored[:, None]  # a query without scores has a distribution too, whose term is thrown away
    log_p = log_softmax(
        (teacher / (teacher_temperature or temperature)).nan_to_num().masked_fill(~usable, float("-inf")), dim=1
    )
    log_q = log_softmax((student / temperature).masked_fill(~usable, float("-inf")), dim=1)
    terms = torch.where(usable, log_p.exp() * (torch.where(usable, log_p, 0) - torch.where(usable, log_q, 0)), 0)
    return torch.where(scored, terms.sum(1) * temperature**2, 0)


def margin_mse(student: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    """[(s⁺ − s⁻) − (t⁺ − t⁻)]² of each negative (Margin-MSE, arXiv 2010.02666).

    Args:
        student: (B, C) scores, the positive first.
        margins: (B, C − 1) the teacher's t⁺ − t⁻, NaN where there is none.

    Returns:
        (B,) the sum over the negatives that the teacher scored, and (B,) how many they are.
    """
    known = ~margins.isnan()
    errors = student[:, :1] - student[:, 1:] - margins.nan_to_num()
    return torch.where(known, errors, 0).square().sum(1), known.sum(1)


class Distillation(RepresentationLoss):
    """Base of the losses that compare a query's candidates by the teacher's scores, which are a column of the rows.

    Args:
        column: of the teacher's scores, one a candidate.
        weight: λ.
    """

    needs_positive = False
    needs_negatives = True

    def __init__(self, column: str = "score", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.columns = (column,)
        self.column = column

    def cosines(self, reps: Representations) -> Tensor:
        """(B, C), in float32 at least."""
        wide = torch.promote_types(reps.queries.dtype, torch.float32)
        with torch.autocast(reps.queries.device.type, enabled=False):
            return torch.einsum("bd,bcd->bc", reps.queries.to(wide), reps.passages.to(wide))

    def check_columns(self, kinds: Mapping[str, ColumnKind], num_hard_negatives: int) -> None:
        if kinds[self.column] != "candidate":
            raise ValueError(
                f"{type(self).__name__}.column={self.column!r} has one number a query, but the loss compares a query's "
                "candidates; give a list of scores, one for each positive and then each negative"
            )

    def scored(self, rows: Sequence[RowNumbers]) -> list[list[float]]:
        """The teacher's scores of each row that has two at least."""
        lists = [value for row in rows if isinstance(value := row.get(self.column), tuple)]
        known = [[score for score in scores if not math.isnan(score)] for scores in lists]
        return [scores for scores in known if len(scores) > 1]

    def teacher(self, reps: Representations) -> Tensor:
        """The column, of a kind that the loss can use. Raises: ValueError: see :meth:`check_columns`."""
        scores = reps.columns[self.column]
        self.check_columns({self.column: "candidate" if scores.dim() == 2 else "query"}, reps.passages.shape[1] - 1)
        return scores


def mean_of_scored(sums: Tensor, counts: Tensor) -> Tensor:
    """Σ sums / Σ counts over all ranks, as the mean over ranks of what each returns; 0 where nothing was scored.

    Args:
        sums: (B,) of this rank's queries.
        counts: (B,) how many scores each sum has.
    """
    total = sum(gather_sizes(int(counts.sum()), counts.device))
    return sums.sum() * world()[1] / max(total, 1)


class DistillationKL(Distillation):
    """:func:`distillation_kl` from the teacher's distribution over a query's candidates to the student's.

    The mean over the queries of the global batch that have two scores at least. For cosines as the teacher's scores, or
    logits of a cross-encoder (teacher_temperature 1); with a temperature far above 0.05 the distribution of cosines is
    almost flat. At T = 0.05 the factor T² makes it 400 times smaller than the KL itself, so it has hardly an effect
    beside InfoNCE; a ``weight`` of 1 / T² gives the KL back.

    Args:
        column: of the teacher's scores, one a candidate.
        temperature: T, divides the cosines, and the teacher's scores too if they have no temperature of their own.
        teacher_temperature: divides the teacher's scores; null takes ``temperature``.
        weight: λ.

    Raises:
        ValueError: a temperature that is not positive.
    """

    name = "distillation_kl"

    def __init__(
        self,
        column: str = "score",
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(column, weight)
        for option, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
            if value is not None:
                check_positive(self, option, value)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def doubt(self, rows: Sequence[RowNumbers]) -> str | None:
        """A teacher that is practically one-hot for nearly all rows, as scores in another unit (BM25's) make it."""
        scored = self.scored(rows)
        temperature = self.teacher_temperature or self.temperature
        tops = [torch.tensor(scores).double().div(temperature).softmax(0).max().item() for scores in scored]
        one_hot = sum(top > _ONE_HOT for top in tops)
        if one_hot <= _NEARLY_ALL * len(tops):
            return None
        name = "temperature" if self.teacher_temperature is None else "teacher_temperature"
        spread = statistics.median(map(statistics.stdev, scored))
        return (
            f"DistillationKL.{name}={temperature:g}: for {one_hot} of {len(tops)} rows the teacher gives more than "
            f"{_ONE_HOT:.0%} to one candidate, so that it teaches no more than a label does; its scores of a query "
            f"have a standard deviation of {spread:.2g}: try a teacher_temperature of about that"
        )

    def forward(self, reps: Representations) -> Tensor:
        teacher = self.teacher(reps)
        losses = distillation_kl(self.cosines(reps), teacher, self.temperature, self.teacher_temperature)
        return mean_of_scored(losses, (~teacher.isnan()).sum(1) > 1)


class MarginMSE(Distillation):
    """:func:`margin_mse`, the mean over all negatives of the global batch that the teacher scored.

    A column with one number a query is the margin t⁺ − t⁻ itself, of rows with one negative.

    Args:
        column: of the teacher's scores, one a candidate.
        scale: the student's scores are cosines times this. A cross-encoder's margins reach 10 and more, those of
            cosines 2 at most.
        weight: λ.

    Raises:
        ValueError: a scale that is not positive.
    """

    name = "margin_mse"
    needs_positive = True

    def __init__(self, column: str = "score", scale: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(column, weight)
        check_positive(self, "scale", scale)
        self.scale = scale

    def check_columns(self, kinds: Mapping[str, ColumnKind], num_hard_negatives: int) -> None:
        if kinds[self.column] == "query" and num_hard_negatives != 1:
            raise ValueError(
                f"MarginMSE.column={self.column!r} has one number a query, the margin of one negative, and there are "
                f"{num_hard_negatives} (num_hard_negatives); set that to 1, or give a list of scores, one for each "
                "positive and then each negative"
            )

    def doubt(self, rows: Sequence[RowNumbers]) -> str | None:
        """Margins that no two cosines have, for most rows."""
        single = [value for row in rows if isinstance(value := row.get(self.column), float) and not math.isnan(value)]
        margins = [*single, *(scores[0] - score for scores in self.scored(rows) for score in scores[1:])]
        beyond = sum(abs(margin) > 2 * self.scale for margin in margins)
        if 2 * beyond <= len(margins):
            return None
        return (
            f"MarginMSE.scale={self.scale:g}: {beyond} of {len(margins)} of the teacher's margins are beyond "
            f"{2 * self.scale:g}, which no difference of two cosines times scale reaches; their median is "
            f"{statistics.median(map(abs, margins)):.2g}: try a scale of about that"
        )

    def forward(self, reps: Representations) -> Tensor:
        teacher = self.teacher(reps)
        margins = teacher[:, None] if teacher.dim() == 1 else teacher[:, :1] - teacher[:, 1:]
        return mean_of_scored(*margin_mse(self.scale * self.cosines(reps), margins))
