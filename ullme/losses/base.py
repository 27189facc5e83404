"""What a term of the objective is. Losses know tensors and never hold the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ullme.batch import Batch, ColumnKind, Direction, Representations

# The directions in which one text is generated after another.
TextDirection = Literal["passage_given_query", "query_given_passage"]

# Columns of one training row: name -> a number of the query, or one for each candidate; NaN where there is none.
RowNumbers = Mapping[str, float | tuple[float, ...]]


class Term(nn.Module):
    """A term of the objective.

    A term that reads numbers of the training rows (teacher scores, labels) names them in ``columns``, class by class or
    set in ``__init__``; rows that have none of them are refused before training.

    Args:
        weight: λ, the term's factor in the objective.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    name = "term"
    needs_positive = True  # whether each query's first candidate must be known to be a positive
    needs_negatives = False  # whether it compares a query's own candidates, so that there must be several
    columns: tuple[str, ...] = ()  # the columns of numbers that it reads
    # whether it looks at more than one positive of a row (data.num_positives); else the first stands for all of them
    uses_extra_positives: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_factor(self, "weight", weight)
        self.weight = weight

    def check_columns(self, kinds: Mapping[str, ColumnKind], num_hard_negatives: int) -> None:
        """Before training.

        Args:
            kinds: of the columns of the rows, among them those that the term reads.
            num_hard_negatives: N.

        Raises:
            ValueError: a column has a number for each query where the term needs one for each candidate, or the other
                way round.
        """

    def compares_candidates(self, labelled: bool) -> bool:
        """Whether a row must have several candidates; ``labelled``: its positive is known."""
        return self.needs_negatives

    def doubt(self, rows: Sequence[RowNumbers]) -> str | None:
        """What looks wrong about the numbers of the training rows, for a warning before training; None: nothing.

        Args:
            rows: the columns of some rows.
        """
        return None


class RepresentationLoss(Term):
    """A term that sees the representations of the whole batch and gathers those of the other ranks itself.

    A term that sets ``teacher_direction`` is given ``reps.teacher``: how well the pre-trained LLM (the objective's
    reference) finds that each candidate fits its query, in nats a token. One that sets ``uses_guide`` is given
    ``reps.guide_queries`` and ``reps.guide_passages``, embeddings by the LLM with its adapters off.
    """

    teacher_direction: Direction | None = None
    uses_guide: bool = False
    # the numbers of leading dimensions, the largest first, that the term trains as embeddings besides the full width
    matryoshka_dims: tuple[int, ...] = ()

    def check_width(self, width: int) -> None:
        """Before training. Raises: ValueError: the term does not fit embeddings of D = ``width`` dimensions."""

    def forward(self, reps: Representations) -> Tensor:
        """The unweighted term: a scalar, the mean over this rank's queries (see :mod:`ullme.distributed`)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(reps)")

    def metrics(self, reps: Representations) -> dict[str, Tensor]:
        """Name -> scalar worth logging besides the loss, without gradient; the mean over ranks is what is logged."""
        return {}


@dataclass(frozen=True)
class Chunk:
    """What a chunk term may look at: b queries with their C candidates, the positive first where it is known.

    A term's likelihoods are those of its ``direction``: log π(p|q), log π(q|p), or log π(p|q) − log π(p).

    Args:
        batch: the b queries, with their keys, labels and columns.
        reps: representations, queries (b, D) and passages (b, C, D), or None if no term uses them.
        policy_logps: (b, C) log-likelihoods, in nats; zero where no term asked for one.
        reference_logps: (b, C) the same under π_ref, without gradient, or None if no term uses it.
        lengths: (b, C) tokens that are scored: of each passage, or of the query for log π(q|p).
        statistics: term name -> the mean over the global batch of what the term's ``statistic`` returned.
        masked_logps: (b,) mean log-probability of each query's masked tokens, in nats, or None if no term masks any.
    """

    batch: Batch
    reps: Representations | None
    policy_logps: Tensor
    reference_logps: Tensor | None
    lengths: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)
    masked_logps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def row_ids(self) -> Tensor:
        """(b,), as in :class:`~ullme.batch.Batch`."""
        return self.batch.row_ids

    @property
    def passage_keys(self) -> Tensor:
        """(b, C), likewise."""
        return self.batch.passage_keys

    @property
    def labelled(self) -> bool:
        """Whether the first candidate is known to be a positive."""
        return self.batch.labelled

    @property
    def columns(self) -> Mapping[str, Tensor]:
        """Name -> (b, C) or (b,) numbers of the training rows, NaN where there is none."""
        return self.batch.columns

    @property
    def reference(self) -> Tensor:
        """(b, C) log-likelihoods under π_ref; for terms that declare ``uses_reference``."""
        assert self.reference_logps is not None
        return self.reference_logps


class ChunkLoss(Term):
    """A term that is a mean over queries of something that each query has by itself, so it can be chunked exactly.

    What it looks at, class by class or set in ``__init__``: representations (``uses_reps``); likelihoods
    (``uses_generation``) of its ``direction`` under the policy (``uses_policy``) and under the pre-trained LLM
    (``uses_reference``).
    """

    uses_reps = False
    uses_reference = False
    uses_policy = True
    uses_generation = True
    needs_negatives = True
    direction: Direction = "passage_given_query"

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which candidates' likelihoods the term looks at, and which of the policy's it needs gradients of.

        Returns:
            Two (b, C) bool masks, the second within the first: all, or none for a term without generation.
        """
        every = torch.full_like(batch.passage_keys, self.uses_generation, dtype=torch.bool)
        return every, every

    def statistic_candidates(self, batch: Batch) -> Tensor | None:
        """(b, C) bool, the candidates of a statistic of the batch that must be known before any gradient, or None."""
        return None

    @property
    def statistic_of_mismatched_pairs(self) -> bool:
        """Whether the term has a statistic of each query with the next query's positive as its only candidate, over the
        global batch, instead of ``statistic_candidates``."""
        return False

    def statistic(self, chunk: Chunk) -> Tensor:
        """(b,) whose mean over the global batch becomes ``chunk.statistics[name]``; without gradient. For mismatched
        pairs of a global batch with a single query, which has none, the statistic is 0."""
        raise NotImplementedError(f"{type(self).__name__} must define statistic(chunk)")

    def forward(self, chunk: Chunk) -> Tensor:
        """(b,) the unweighted term of each query, in nats."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(chunk)")

    def metrics(self, chunk: Chunk) -> dict[str, Tensor]:
        """Name -> (b,) worth logging besides the loss, without gradient."""
        return {}


def check_factor(term: Term, option: str, value: float) -> None:
    """Raises: ValueError: a factor or margin of a loss that is negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{type(term).__name__}.{option}={value}: must be a number of 0 or more")


def check_positive(term: Term, option: str, value: float) -> None:
    """Raises: ValueError: a temperature, scale or β that is not positive, or not finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{type(term).__name__}.{option}={value}: must be above 0, and finite")


def check_text_direction(term: Term, direction: str) -> None:
    """Raises: ValueError: no direction in which a text is generated."""
    if direction not in get_args(TextDirection):
        raise ValueError(
            f"{type(term).__name__}.direction={direction!r}: choose {' or '.join(get_args(TextDirection))}"
        )


def only_candidates(batch: Batch, count: int) -> Tensor:
    """(b, C) bool, True on each query's first ``count`` candidates."""
    mask = torch.zeros_like(batch.passage_keys, dtype=torch.bool)
    mask[:, :count] = True
    return mask
