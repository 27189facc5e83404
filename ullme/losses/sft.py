"""Supervised fine-tuning on the positive: L_SFT (arXiv 2408.03402, eq. 5)."""

from __future__ import annotations

from torch import Tensor

from ullme.batch import Batch
from ullme.losses.base import Chunk, ChunkLoss, only_candidates


def sft_loss(chosen_logps: Tensor, lengths: Tensor) -> Tensor:
    """−(1/t) log π(p⁺|q), in nats a token.

    Args:
        chosen_logps: (b,) log-likelihood of each positive.
        lengths: (b,) its tokens t.

    Returns:
        (b,).
    """
    return -chosen_logps / lengths


class SFT(ChunkLoss):
    """Language modelling of the positive after its query.

    Args:
        weight: λ_SFT.
    """

    name = "sft"
    needs_negatives = False

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positive = only_candidates(batch, 1)
        return positive, positive

    def forward(self, chunk: Chunk) -> Tensor:
        return sft_loss(chunk.policy_logps[:, 0], chunk.lengths[:, 0])
