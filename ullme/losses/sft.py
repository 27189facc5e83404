"""Supervised fine-tuning on the positive: L_SFT (arXiv 2408.03402, eq. 5)."""

from __future__ import annotations

from torch import Tensor

from ullme.batch import Batch
from ullme.losses.base import Chunk, ChunkLoss, TextDirection, check_text_direction, only_candidates


def sft_loss(chosen_logps: Tensor, lengths: Tensor) -> Tensor:
    """−(1/t) log π(p⁺|q), in nats a token; or −(1/t) log π(q|p⁺).

    Args:
        chosen_logps: (b,) log-likelihood of each positive (or of each query after its positive).
        lengths: (b,) the tokens t that are scored.

    Returns:
        (b,).
    """
    return -chosen_logps / lengths


class SFT(ChunkLoss):
    """Language modelling of the positive after its query, or of the query after its positive.

    Args:
        weight: λ_SFT.
        direction: ``passage_given_query``, the paper's −(1/t) log π(p⁺|q), or ``query_given_passage``,
            −(1/t) log π(q|p⁺), which trains a generator of queries.

    Raises:
        ValueError: an unknown direction.
    """

    name = "sft"
    needs_negatives = False

    def __init__(self, weight: float = 1.0, direction: TextDirection = "passage_given_query") -> None:
        super().__init__(weight)
        check_text_direction(self, direction)
        self.direction = direction

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positive = only_candidates(batch, 1)
        return positive, positive

    def forward(self, chunk: Chunk) -> Tensor:
        return sft_loss(chunk.policy_logps[:, 0], chunk.lengths[:, 0])
