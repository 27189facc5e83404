"""What a term of the objective is. Losses know tensors and never hold the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ullme.batch import Batch, Representations


class Term(nn.Module):
    """A term of the objective.

    Args:
        weight: λ, the term's factor in the objective.

    Raises:
        ValueError: a negative weight.
    """

    name = "term"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"{type(self).__name__}.weight={weight}: must be 0 or more")
        self.weight = weight


class RepresentationLoss(Term):
    """A term that sees the representations of the whole batch and gathers those of the other ranks itself."""

    def forward(self, reps: Representations) -> Tensor:
        """The unweighted term: a scalar, the mean over this rank's queries (see :mod:`ullme.distributed`)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(reps)")


@dataclass(frozen=True)
class Chunk:
    """What a chunk term may look at: b queries with their C candidates, the positive first.

    Args:
        reps: representations, queries (b, D) and passages (b, C, D), or None if no term uses them.
        policy_logps: (b, C) log π(p|q), in nats; zero where no term asked for it.
        reference_logps: (b, C) log π_ref(p|q), without gradient, or None if no term uses it.
        lengths: (b, C) tokens of each passage; one where no term asked for it.
        row_ids: (b,), as in :class:`~ullme.batch.Batch`.
        passage_keys: (b, C), likewise.
        statistics: term name -> the mean over the global batch of what the term's ``statistic`` returned.
        masked_logps: (b,) mean log-probability of each query's masked tokens, in nats, or None if no term masks any.
    """

    reps: Representations | None
    policy_logps: Tensor
    reference_logps: Tensor | None
    lengths: Tensor
    row_ids: Tensor
    passage_keys: Tensor
    statistics: dict[str, Tensor]
    masked_logps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def reference(self) -> Tensor:
        """(b, C) log π_ref(p|q); for terms that declare ``uses_reference``."""
        assert self.reference_logps is not None
        return self.reference_logps


class ChunkLoss(Term):
    """A term that is a mean over queries of something that each query has by itself, so it can be chunked exactly."""

    uses_reps = False
    uses_reference = False
    uses_generation = True
    needs_negatives = True

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which candidates' likelihoods the term looks at, and which of these it needs gradients of.

        Returns:
            Two (b, C) bool masks, the second within the first: all, or none for a term without generation.
        """
        every = torch.full_like(batch.passage_keys, self.uses_generation, dtype=torch.bool)
        return every, every

    def statistic_candidates(self, batch: Batch) -> Tensor | None:
        """(b, C) bool, the candidates of a statistic of the batch that must be known before any gradient, or None."""
        return None

    def statistic(self, chunk: Chunk) -> Tensor:
        """(b,) whose mean over the global batch becomes ``chunk.statistics[name]``; without gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define statistic(chunk)")

    def forward(self, chunk: Chunk) -> Tensor:
        """(b,) the unweighted term of each query, in nats."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(chunk)")

    def metrics(self, chunk: Chunk) -> dict[str, Tensor]:
        """Name -> (b,) worth logging besides the loss, without gradient."""
        return {}


def only_candidates(batch: Batch, count: int) -> Tensor:
    """(b, C) bool, True on each query's first ``count`` candidates."""
    mask = torch.zeros_like(batch.passage_keys, dtype=torch.bool)
    mask[:, :count] = True
    return mask
