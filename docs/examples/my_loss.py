"""A loss of your own: the margin loss of a query's positive over its hard negatives.

python train.py fit --config configs/base.yaml --config configs/model/phi-1.5.yaml --config docs/examples/my_loss.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor

from ullme.losses.base import Chunk, ChunkLoss


def margin_loss(queries: Tensor, passages: Tensor, margin: float) -> Tensor:
    """Mean over the negatives of max(0, margin - cos(q, p+) + cos(q, p-)).

    Args:
        queries: (b, D) of unit length.
        passages: (b, C, D) of unit length, the positive first.
        margin: by how much the positive's cosine must exceed a negative's.

    Returns:
        (b,), one number per query.
    """
    cosines = torch.einsum("bd,bcd->bc", queries, passages).float()
    return (margin - cosines[:, :1] + cosines[:, 1:]).clamp(min=0).mean(dim=1)


class Margin(ChunkLoss):
    """A term that each query has by itself, so it can be computed chunk by chunk.

    A term that compares queries with each other is a ``RepresentationLoss``: see ullme/losses/info_nce.py.

    Args:
        margin: above 0, of cosines.
        weight: the term's factor in the objective.
    """

    name = "margin"  # it is logged as train/margin
    uses_reps = True  # it looks at embeddings
    uses_generation = False  # and not at likelihoods

    def __init__(self, margin: float = 0.2, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not margin > 0:
            raise ValueError(f"Margin.margin={margin}: must be above 0")
        self.margin = margin

    def forward(self, chunk: Chunk) -> Tensor:
        """(b,) the term of each query, without its weight."""
        assert chunk.reps is not None
        return margin_loss(chunk.reps.queries, chunk.reps.passages, self.margin)
