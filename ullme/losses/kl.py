"""The tie between embedding and generation: KL between two rankings of a query's candidates."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ullme.batch import Batch
from ullme.losses.base import Chunk, ChunkLoss

Direction = Literal["retrieval_to_generation", "generation_to_retrieval"]


def kl_loss(retrieval: Tensor, generation: Tensor, direction: Direction = "retrieval_to_generation") -> Tensor:
    """Σ_U P_rt log(P_rt / P_gen) over the candidates U (arXiv 2408.03402, eq. 9), or the other way round.

    Args:
        retrieval: (b, C) scores s_rt over their temperature; P_rt is their softmax.
        generation: (b, C) scores s_gen over their temperature; P_gen is their softmax.
        direction: which distribution the mean is taken under.

    Returns:
        (b,) in nats.
    """
    log_p, log_q = log_softmax(retrieval, dim=1), log_softmax(generation, dim=1)
    if direction == "generation_to_retrieval":
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(1)


class KL(ChunkLoss):
    """:func:`kl_loss` between P_rt, of cosines, and P_gen, of mean token log-probabilities.

    Args:
        direction: the paper's is ``retrieval_to_generation``, KL(P_rt ‖ P_gen).
        retrieval_temperature: divides the cosines. The paper has none, which leaves P_rt almost flat.
        generation_temperature: divides the mean log-probabilities.
        detach_generation: teach the embedding only; no gradient through P_gen, which saves its backward.
        weight: λ_KL.

    Raises:
        ValueError: a temperature that is not positive, or an unknown direction.
    """

    name = "kl"
    uses_reps = True

    def __init__(
        self,
        direction: Direction = "retrieval_to_generation",
        retrieval_temperature: float = 1.0,
        generation_temperature: float = 1.0,
        detach_generation: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if direction not in get_args(Direction):
            raise ValueError(f"KL.direction={direction!r}: choose {' or '.join(get_args(Direction))}")
        for option, value in (
            ("retrieval_temperature", retrieval_temperature),
            ("generation_temperature", generation_temperature),
        ):
            if not value > 0:
                raise ValueError(f"KL.{option}={value}: must be above 0")
        self.direction: Direction = direction
        self.retrieval_temperature, self.generation_temperature = retrieval_temperature, generation_temperature
        self.detach_generation = detach_generation

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)
        return everything, everything & (not self.detach_generation)

    def scores(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(b, C) s_rt and s_gen over their temperatures, in float32 at least."""
        assert chunk.reps is not None
        wide = torch.promote_types(chunk.reps.queries.dtype, torch.float32)
        with torch.autocast(chunk.reps.queries.device.type, enabled=False):
            cosines = torch.einsum("bd,bcd->bc", chunk.reps.queries.to(wide), chunk.reps.passages.to(wide))
        generation = chunk.policy_logps / chunk.lengths
        if self.detach_generation:
            generation = generation.detach()
        return cosines / self.retrieval_temperature, generation / self.generation_temperature

    def forward(self, chunk: Chunk) -> Tensor:
        return kl_loss(*self.scores(chunk), self.direction)

    @torch.no_grad()
    def metrics(self, chunk: Chunk) -> dict[str, Tensor]:
        """Spearman's rank correlation of the two rankings, for each query."""
        from torchmetrics.functional import spearman_corrcoef

        retrieval, generation = self.scores(chunk)
        if retrieval.shape[1] < 2:
            return {}
        agreement = spearman_corrcoef(retrieval.float().T, generation.float().T)
        return {"rank_agreement": agreement.reshape(len(chunk))}
