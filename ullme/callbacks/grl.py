"""The paper's objective under one name: L_GRL (arXiv 2408.03402, eq. 10)."""

from __future__ import annotations

from typing import Literal

from ullme.callbacks.base import ReferenceChoice
from ullme.callbacks.gradcache import GradCache, OnOutOfMemory
from ullme.losses import CPO, DPO, KL, KTO, SFT, InfoNCE, Term

Generation = Literal["dpo", "sft", "kto", "cpo"]


def grl_terms(
    generation: Generation | None = "dpo",
    use_kl: bool = True,
    temperature: float = 0.05,
    beta: float = 0.1,
    contrastive_weight: float = 1.0,
    generation_weight: float = 0.5,
    kl_weight: float = 1.0,
    retrieval_temperature: float = 1.0,
    generation_temperature: float = 1.0,
    detach_generation: bool = False,
) -> list[Term]:
    """The terms of L_GRL; see :class:`GRL`. ``generation=None`` leaves that term out, ``use_kl=False`` the KL."""
    makers = {
        "dpo": lambda: DPO(beta, weight=generation_weight),
        "sft": lambda: SFT(generation_weight),
        "kto": lambda: KTO(beta, weight=generation_weight),
        "cpo": lambda: CPO(beta, weight=generation_weight),
    }
    if generation is not None and generation not in makers:
        raise ValueError(f"generation={generation!r}: choose one of {', '.join(makers)}")
    terms: list[Term] = [InfoNCE(temperature, weight=contrastive_weight)]
    if generation is not None:
        terms.append(makers[generation]())
    if use_kl:
        kl = KL(
            retrieval_temperature=retrieval_temperature,
            generation_temperature=generation_temperature,
            detach_generation=detach_generation,
            weight=kl_weight,
        )
        terms.append(kl)
    return terms


class GRL(GradCache):
    """Generation-augmented representation learning: λ_CL L_CL + λ_DPO L_DPO + λ_KL L_KL, with GradCache.

    Args:
        generation: the generation term: dpo is the paper's GRL, sft its GRL_SFT; kto and cpo are its other methods.
        temperature: τ of InfoNCE.
        beta: β of the preference loss.
        contrastive_weight: λ_CL.
        generation_weight: λ_DPO; 0 leaves the term out.
        kl_weight: λ_KL; 0 likewise.
        retrieval_temperature: divides the cosines in P_rt.
        generation_temperature: divides the mean log-probabilities in P_gen.
        detach_generation: no gradient of the KL through P_gen.
        chunk_size: as in :class:`~ullme.callbacks.GradCache`.
        chunk_tokens: likewise.
        reference: likewise.
        cache_reference: likewise.
        share_prompts: likewise.
        on_oom: likewise.
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
    ) -> None:
        terms = grl_terms(
            generation if generation_weight > 0 else None,
            kl_weight > 0,
            temperature,
            beta,
            contrastive_weight,
            generation_weight,
            kl_weight,
            retrieval_temperature,
            generation_temperature,
            detach_generation,
        )
        super().__init__(terms, chunk_size, chunk_tokens, reference, cache_reference, share_prompts, on_oom)
