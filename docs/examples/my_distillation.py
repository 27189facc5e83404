r"""A loss on numbers of your own: an annotator's grades, which travel with the rows.

python train.py fit --config configs/base.yaml --config configs/model/phi-1.5.yaml \
  --config docs/examples/my_distillation.yaml --data.train graded.jsonl

A row: {"query": "who founded the town?", "pos": ["Ada did."], "neg": ["It has a mill.", "Bo sold it."],
        "grades": [3, 0, 1], "trust": 0.8}

Grades belong to candidates, one for each positive and then each negative; trust belongs to the query. data.columns
names both (docs/examples/my_distillation.yaml). A null, or a row without the field, is NaN in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ullme.losses.base import Chunk, ChunkLoss


def graded_mse(cosines: Tensor, grades: Tensor, trust: Tensor) -> Tensor:
    """trust · mean over the graded candidates of (cos - grade / 3)².

    Args:
        cosines: (b, C).
        grades: (b, C) from 0 to 3, NaN for a candidate that nobody graded.
        trust: (b,), NaN counts as 1.

    Returns:
        (b,), 0 for a query without grades.
    """
    graded = ~grades.isnan()
    errors = torch.where(graded, cosines - grades.nan_to_num() / 3, 0).square()
    return trust.nan_to_num(1.0) * errors.sum(1) / graded.sum(1).clamp(min=1)


class Graded(ChunkLoss):
    """Each query has its term by itself, so it is computed chunk by chunk, with the same result."""

    name = "graded"
    uses_reps = True
    uses_generation = False
    needs_negatives = False
    columns = ("grades", "trust")  # rows without them are refused before training

    def forward(self, chunk: Chunk) -> Tensor:
        assert chunk.reps is not None
        cosines = torch.einsum("bd,bcd->bc", chunk.reps.queries, chunk.reps.passages)
        return graded_mse(cosines, chunk.columns["grades"], chunk.columns["trust"])
