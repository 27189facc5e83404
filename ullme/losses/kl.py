"""KL divergence between the retrieval and the generation ranking of a query's candidates (arXiv 2408.03402, eq. 9)."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ullme.batch import Batch, Direction
from ullme.losses.base import Chunk, ChunkLoss, check_positive
from ullme.losses.ranking import rank_correlation, rank_of_first

log = logging.getLogger(__name__)

Divergence = Literal["retrieval_to_generation", "generation_to_retrieval"]
Teacher = Literal["policy", "reference"]


def kl_loss(retrieval: Tensor, generation: Tensor, direction: Divergence = "retrieval_to_generation") -> Tensor:
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
    """:func:`kl_loss` between P_rt, of cosines, and P_gen, of mean token log-probabilities s_gen.

    With ``direction: query_given_passage`` and ``teacher: reference`` this is ART (arXiv 2206.10658): an embedder
    learns the frozen LLM's query likelihood (UPR, arXiv 2204.07496), without any label.

    Args:
        direction: what s_gen is the mean of, over the tokens that are scored. ``passage_given_query``: log π(p|q), the
            paper's. ``query_given_passage``: log π(q|p); it ranks far better, since log π(p|q) is mostly how likely a
            passage is by itself. ``gain``: log π(p|q) − log π(p), where log π(p) has the same prompt
            (``prompts.generation``) with an empty query.
        retrieval_temperature: divides the cosines. The paper has none, which leaves P_rt almost flat.
        generation_temperature: divides the mean log-probabilities.
        detach_generation: teach the embedding only; no gradient through P_gen, which saves its backward.
        weight: λ_KL.
        teacher: whose likelihoods P_gen is of: the ``policy``, which the KL trains too, as in the paper; or the
            ``reference``, the pre-trained LLM without gradient. With a ``cache_reference`` folder the reference is
            computed once, and then the KL takes no generation forward at all.
        divergence: the paper's is ``retrieval_to_generation``, KL(P_rt ‖ P_gen).

    Raises:
        ValueError: a temperature that is not positive, or an unknown direction, teacher or divergence.
    """

    name = "kl"
    uses_reps = True
    needs_positive = False

    def __init__(
        self,
        direction: Direction | Divergence = "passage_given_query",
        retrieval_temperature: float = 1.0,
        generation_temperature: float = 1.0,
        detach_generation: bool = False,
        weight: float = 1.0,
        teacher: Teacher = "policy",
        divergence: Divergence = "retrieval_to_generation",
    ) -> None:
        super().__init__(weight)
        if direction in get_args(Divergence):  # until version 0.1 the option was called so
            log.warning("KL.direction=%s is now called KL.divergence; direction says what is generated", direction)
            direction, divergence = "passage_given_query", direction  # type: ignore[assignment]
        choices: tuple[tuple[str, Any, Any], ...] = (
            ("direction", direction, Direction),
            ("teacher", teacher, Teacher),
            ("divergence", divergence, Divergence),
        )
        for option, value, known in choices:
            if value not in get_args(known):
                raise ValueError(f"KL.{option}={value!r}: choose {' or '.join(get_args(known))}")
        for option, temperature in (
            ("retrieval_temperature", retrieval_temperature),
            ("generation_temperature", generation_temperature),
        ):
            check_positive(self, option, temperature)
        self.direction = direction  # type: ignore[assignment]
        self.divergence, self.teacher = divergence, teacher
        self.retrieval_temperature, self.generation_temperature = retrieval_temperature, generation_temperature
        self.detach_generation = detach_generation
        self.uses_policy, self.uses_reference = teacher == "policy", teacher == "reference"

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)
        return everything, everything & (self.uses_policy and not self.detach_generation)

    def scores(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(b, C) s_rt and s_gen over their temperatures, in float32 at least."""
        assert chunk.reps is not None
        wide = torch.promote_types(chunk.reps.queries.dtype, torch.float32)
        with torch.autocast(chunk.reps.queries.device.type, enabled=False):
            cosines = torch.einsum("bd,bcd->bc", chunk.reps.queries.to(wide), chunk.reps.passages.to(wide))
        generation = (chunk.policy_logps if self.uses_policy else chunk.reference) / chunk.lengths
        if self.detach_generation:
            generation = generation.detach()
        return cosines / self.retrieval_temperature, generation / self.generation_temperature

    def forward(self, chunk: Chunk) -> Tensor:
        return kl_loss(*self.scores(chunk), self.divergence)

    @torch.no_grad()
    def metrics(self, chunk: Chunk) -> dict[str, Tensor]:
        """Of each query: Spearman's correlation of the two rankings; where the positive is known, whether the teacher
        (P_gen) ranks it first, and the reciprocal of the rank that it gives it."""
        retrieval, generation = self.scores(chunk)
        if retrieval.shape[1] < 2:
            return {}
        found = {"rank_agreement": rank_correlation(retrieval, generation)}
        if chunk.labelled:
            accuracy, reciprocal = rank_of_first(generation)
            found |= {"teacher_accuracy": accuracy, "teacher_mrr": reciprocal}
        return found
