"""What a term of the objective is. Losses know tensors and never hold the model."""

from __future__ import annotations

from torch import Tensor, nn

from ullme.batch import Representations


class RepresentationLoss(nn.Module):
    """A term that sees the representations of the whole batch and gathers those of the other ranks itself.

    Args:
        weight: λ, the term's factor in the objective.

    Raises:
        ValueError: a negative weight.
    """

    name = "loss"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"{type(self).__name__}.weight={weight}: must be 0 or more")
        self.weight = weight

    def forward(self, reps: Representations) -> Tensor:
        """The unweighted term: a scalar, the mean over this rank's queries (see :mod:`ullme.distributed`)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(reps)")
