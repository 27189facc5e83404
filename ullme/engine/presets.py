"""The paper's objective by name: the terms of L_GRL (arXiv 2408.03402, eq. 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ullme.batch import Direction
from ullme.losses import CPO, DPO, KL, KTO, SFT, InfoNCE, Term
from ullme.losses.base import TextDirection
from ullme.losses.kl import Divergence, Teacher

Generation = Literal["dpo", "sft", "kto", "cpo"]


def grl_terms(
    generation: Generation | None = "dpo",
    use_kl: bool = True,
    *,
    temperature: float = 0.05,
    beta: float = 0.1,
    contrastive_weight: float = 1.0,
    generation_weight: float = 0.5,
    kl_weight: float = 1.0,
    retrieval_temperature: float = 1.0,
    generation_temperature: float = 1.0,
    detach_generation: bool = False,
    direction: Direction = "passage_given_query",
    teacher: Teacher = "policy",
    divergence: Divergence = "retrieval_to_generation",
) -> list[Term]:
    """The terms of L_GRL: InfoNCE, a generation term and the KL between the two rankings.

    Args:
        generation: the generation term: dpo is the paper's GRL, sft its GRL_SFT; None leaves it out.
        use_kl: whether there is a KL.
        temperature: τ of InfoNCE.
        beta: β of the preference loss.
        contrastive_weight: λ_CL.
        generation_weight: λ of the generation term.
        kl_weight: λ_KL.
        retrieval_temperature: divides the cosines in P_rt.
        generation_temperature: divides the mean log-probabilities in P_gen.
        detach_generation: no gradient of the KL through P_gen.
        direction: of the generation term and the KL; ``gain`` is the KL's alone, and then the generation term is
            ``passage_given_query``.
        teacher: whose likelihoods P_gen is of.
        divergence: which of P_rt and P_gen the KL takes the mean under.

    Raises:
        ValueError: an unknown choice, or an option that is out of range.
    """
    text: TextDirection = "passage_given_query" if direction == "gain" else direction
    makers: dict[str, Callable[[], Term]] = {
        "dpo": lambda: DPO(beta, weight=generation_weight, direction=text),
        "sft": lambda: SFT(generation_weight, direction=text),
        "kto": lambda: KTO(beta, weight=generation_weight, direction=text),
        "cpo": lambda: CPO(beta, weight=generation_weight, direction=text),
    }
    if generation is not None and generation not in makers:
        raise ValueError(f"generation={generation!r}: choose one of {', '.join(makers)}")
    terms: list[Term] = [InfoNCE(temperature, weight=contrastive_weight)]
    if generation is not None:
        terms.append(makers[generation]())
    if use_kl:
        kl = KL(
            direction,
            retrieval_temperature=retrieval_temperature,
            generation_temperature=generation_temperature,
            detach_generation=detach_generation,
            weight=kl_weight,
            teacher=teacher,
            divergence=divergence,
        )
        terms.append(kl)
    return terms
