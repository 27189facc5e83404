"""The paper's objective under one name: L_GRL (arXiv 2408.03402, eq. 10)."""

from __future__ import annotations

from typing import Literal

from ullme.batch import Direction
from ullme.callbacks.gradcache import GradCache, OnOutOfMemory
from ullme.engine.presets import Generation, grl_terms
from ullme.engine.reference import ReferenceChoice
from ullme.losses.kl import Divergence, Teacher

__all__ = ["GRL", "grl_terms"]


class GRL(GradCache):
    """Generation-augmented representation learning: λ_CL L_CL + λ_DPO L_DPO + λ_KL L_KL, with GradCache.

    Args:
        generation: the generation term: dpo is the paper's GRL, sft its GRL_SFT; kto and cpo are its other methods.
        temperature: τ of InfoNCE.
        beta: β of the preference loss.
        contrastive_weight: λ_CL; 0 leaves the term out, as rows without labels need it.
        generation_weight: λ_DPO; 0 leaves the term out.
        kl_weight: λ_KL; 0 leaves the term out.
        retrieval_temperature: divides the cosines in P_rt.
        generation_temperature: divides the mean log-probabilities in P_gen.
        detach_generation: no gradient of the KL through P_gen.
        chunk_size: queries in a chunk, each with all its candidates; null leaves it to chunk_tokens.
        chunk_tokens: real tokens in a chunk; auto takes the largest that fits.
        reference: π_ref of DPO and KTO, and of the KL with ``teacher: reference``: the LLM with its adapters off, a
            frozen copy, or only what cache_reference holds.
        cache_reference: folder that keeps reference likelihoods for later epochs, seeds and methods.
        share_prompts: run a generation prompt once for all its targets, where the backbone can be packed.
        on_oom: out of memory: ``fail`` with the chunk to try next, or ``halve_chunk`` and go on.
        direction: what is generated, in the generation term and the KL: ``passage_given_query``, as in the paper;
            ``query_given_passage``, which ranks far better; or ``gain``, of the KL alone.
        teacher: whose likelihoods the KL's P_gen is of: the ``policy``, as in the paper, or the ``reference``, the
            pre-trained LLM without gradient, which costs nothing once it is in cache_reference.
        divergence: ``retrieval_to_generation``, the paper's KL(P_rt ‖ P_gen), or ``generation_to_retrieval``, as in
            distillation: the mean under the teacher.

    Raises:
        ValueError: a negative weight, or an option that a term refuses.
    """

    def __init__(
        self,
        generation: Generation = "dpo",
        temperature: float = 0.05,
        beta: float = 0.1,
        contrastive_weight: float = 1.0,
        generation_weight: float = 0.5,
        kl_weight: float = 1.0,
        retrieval_temperature: float = 1.0,
        generation_temperature: float = 1.0,
        detach_generation: bool = False,
        chunk_size: int | None = None,
        chunk_tokens: int | Literal["auto"] | None = "auto",
        reference: ReferenceChoice = "adapters_off",
        cache_reference: str | None = None,
        share_prompts: bool = True,
        on_oom: OnOutOfMemory = "fail",
        direction: Direction = "passage_given_query",
        teacher: Teacher = "policy",
        divergence: Divergence = "retrieval_to_generation",
    ) -> None:
        weights = {"contrastive": contrastive_weight, "generation": generation_weight, "kl": kl_weight}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"GRL.{name}_weight={weight}: must be 0 or more; 0 leaves the term out")
        if not any(weights.values()):
            raise ValueError("GRL: contrastive_weight, generation_weight and kl_weight are all 0; give one of them")
        terms = grl_terms(
            generation,
            temperature=temperature,
            beta=beta,
            contrastive_weight=contrastive_weight,
            generation_weight=generation_weight,
            kl_weight=kl_weight,
            retrieval_temperature=retrieval_temperature,
            generation_temperature=generation_temperature,
            detach_generation=detach_generation,
            direction=direction,
            teacher=teacher,
            divergence=divergence,
        )
        super().__init__(
            [term for term in terms if term.weight > 0],
            chunk_size=chunk_size,
            chunk_tokens=chunk_tokens,
            reference=reference,
            cache_reference=cache_reference,
            share_prompts=share_prompts,
            on_oom=on_oom,
        )
