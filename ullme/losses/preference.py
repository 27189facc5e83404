"""Preference losses: the positive passage is the chosen answer to its query, the hard negatives are rejected ones.

In the direction ``query_given_passage`` the same text, the query, is scored after different passages: DPO becomes
−log σ(β [log π/π_ref (q|p⁺) − log π/π_ref (q|p⁻)]), and the others change alike. Since chosen and rejected are the same
text, its length and its own probability cancel in every difference: log π(q|p) = log π(q) + the pointwise mutual
information of q and p, so what is left is the difference of the mutual informations of q with p⁺ and with p⁻.

Pure functions take chosen (b,) and rejected (b, K) log-likelihoods and return (b,), the mean over the K rejected ones.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ullme.batch import Batch
from ullme.losses.base import (
    Chunk,
    ChunkLoss,
    TextDirection,
    check_factor,
    check_positive,
    check_text_direction,
    only_candidates,
)
from ullme.losses.sft import sft_loss

Negatives = Literal["all", "first", "random"]
ReferencePairs = Literal["mismatched", "first_negative"]


def dpo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """−log σ(β [r⁺ − r⁻]) with r = log π/π_ref (DPO, arXiv 2305.18290, eq. 7; arXiv 2408.03402, eq. 7).

    Args:
        chosen_ratio: (b,) r⁺.
        rejected_ratio: (b, K) r⁻.
        beta: β, the strength of the tie to the reference.
    """
    return -logsigmoid(beta * (chosen_ratio[:, None] - rejected_ratio)).mean(1)


def ipo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """(r⁺ − r⁻ − 1/(2β))² (IPO, arXiv 2310.12036, eq. 17). Arguments as in :func:`dpo_loss`."""
    return (chosen_ratio[:, None] - rejected_ratio - 1 / (2 * beta)).square().mean(1)


def hinge_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """max(0, 1 − β [r⁺ − r⁻]) (SLiC, arXiv 2305.10425, on DPO's reward). Arguments as in :func:`dpo_loss`."""
    return relu(1 - beta * (chosen_ratio[:, None] - rejected_ratio)).mean(1)


def kto_loss(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """λ_D (1 − σ(β [r⁺ − z])) and λ_U (1 − σ(β [z − r⁻])), averaged (KTO, arXiv 2402.01306, eq. 8).

    The K rejected passages of a query count as much as its one chosen passage, as the paper advises for uneven data.

    Args:
        reference_point: z, a scalar without gradient.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.
    """
    chosen = desirable_weight * (1 - torch.sigmoid(beta * (chosen_ratio - reference_point)))
    rejected = undesirable_weight * (1 - torch.sigmoid(beta * (reference_point - rejected_ratio))).mean(1)
    return (chosen + rejected) / 2


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float) -> Tensor:
    """−log σ(β [log π(p⁺|q) − log π(p⁻|q)]), no reference (CPO, arXiv 2401.08417, eq. 3, without its NLL term)."""
    return dpo_loss(chosen_logps, rejected_logps, beta)


def simpo_loss(chosen_average: Tensor, rejected_average: Tensor, beta: float, gamma: float) -> Tensor:
    """−log σ(β [s⁺ − s⁻] − γ) with s the mean log-probability of a token (SimPO, arXiv 2405.14734, eq. 6)."""
    return -logsigmoid(beta * (chosen_average[:, None] - rejected_average) - gamma).mean(1)


def random_negative(row_ids: Tensor, passage_keys: Tensor) -> Tensor:
    """(b,) index from 1 of one hard negative, at random.

    A function of the row and of the candidates that it drew in this epoch, so no chunk, order or rank changes it.
    """
    return 1 + (row_ids * 2654435761 + passage_keys.sum(1)).remainder(passage_keys.shape[1] - 1)


class PreferenceLoss(ChunkLoss):
    """Base of the losses that set the positive against negatives of its query.

    Args:
        beta: β.
        negatives: against all hard negatives; the first; or one at random, the same for a row and its candidates.
        length_normalized: divide every log-likelihood by the tokens that it is the sum over first.
        weight: λ.
        direction: ``passage_given_query`` prefers the positive passage after the query, as the paper does;
            ``query_given_passage`` prefers the query after the positive passage to the query after negatives.

    Raises:
        ValueError: β that is not positive, or an unknown choice of negatives or direction.
    """

    uses_reference = True

    def __init__(
        self,
        beta: float = 0.1,
        negatives: Negatives = "all",
        length_normalized: bool = False,
        weight: float = 1.0,
        direction: TextDirection = "passage_given_query",
    ) -> None:
        super().__init__(weight)
        check_text_direction(self, direction)
        self.direction = direction
        check_positive(self, "beta", beta)
        if negatives not in get_args(Negatives):
            raise ValueError(f"{type(self).__name__}.negatives={negatives!r}: choose all, first or random")
        self.beta, self.negatives, self.length_normalized = beta, negatives, length_normalized

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.negatives == "random":
            choice = random_negative(batch.row_ids, batch.passage_keys)
            mask = only_candidates(batch, 1).scatter(1, choice[:, None], True)
        else:
            mask = only_candidates(batch, batch.num_candidates if self.negatives == "all" else 2)
        return mask, mask

    def split(self, chunk: Chunk, values: Tensor) -> tuple[Tensor, Tensor]:
        """(b,) of the positive and (b, K) of the negatives that this loss looks at."""
        if self.length_normalized:
            values = values / chunk.lengths
        if self.negatives == "all":
            return values[:, 0], values[:, 1:]
        if self.negatives == "first":
            return values[:, 0], values[:, 1:2]
        return values[:, 0], values.gather(1, random_negative(chunk.row_ids, chunk.passage_keys)[:, None])

    def ratios(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """r = log π/π_ref of the positive and of the negatives."""
        return self.split(chunk, chunk.policy_logps - chunk.reference)

    @torch.no_grad()
    def metrics(self, chunk: Chunk) -> dict[str, Tensor]:
        """Reward margin β (r⁺ − mean r⁻), and the share of negatives with a smaller reward than the positive."""
        chosen, rejected = self.ratios(chunk) if self.uses_reference else self.split(chunk, chunk.policy_logps)
        difference = chosen[:, None] - rejected
        return {
            "reward_margin": self.beta * difference.mean(1),
            "reward_accuracy": (difference > 0).double().mean(1),
        }


class DPO(PreferenceLoss):
    """:func:`dpo_loss`; the paper's L_DPO with β 0.1 and the reference model π_ref of the pre-trained LLM.

    In the direction ``query_given_passage``: −log σ(β [log π/π_ref (q|p⁺) − log π/π_ref (q|p⁻)]), the same text q after
    different passages.
    """

    name = "dpo"

    def forward(self, chunk: Chunk) -> Tensor:
        return dpo_loss(*self.ratios(chunk), self.beta)


class IPO(PreferenceLoss):
    """:func:`ipo_loss`."""

    name = "ipo"

    def forward(self, chunk: Chunk) -> Tensor:
        return ipo_loss(*self.ratios(chunk), self.beta)


class Hinge(PreferenceLoss):
    """:func:`hinge_loss`."""

    name = "hinge"

    def forward(self, chunk: Chunk) -> Tensor:
        return hinge_loss(*self.ratios(chunk), self.beta)


class KTO(PreferenceLoss):
    """:func:`kto_loss`.

    The reference point z = max(0, mean of log π/π_ref over pairs) is a statistic of the global batch, taken in a pass
    of its own without gradient before the first chunk's: it depends neither on chunks nor on the number of ranks.

    Args:
        desirable_weight: λ_D.
        undesirable_weight: λ_U.
        reference_pairs: the pairs of z. ``mismatched``, as in the paper (arXiv 2402.01306, section 4.1): each query of
            the global batch with the positive of the next one, the last with that of the first; a batch of one query
            has no such pair, and z is 0. ``first_negative``: each query with its own first hard negative, which costs
            less and is pushed down by the loss, so that z soon stays at 0.

    Raises:
        ValueError: unknown pairs, or a negative weight.
    """

    name = "kto"

    def __init__(
        self,
        beta: float = 0.1,
        negatives: Negatives = "all",
        length_normalized: bool = False,
        weight: float = 1.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        direction: TextDirection = "passage_given_query",
        reference_pairs: ReferencePairs = "mismatched",
    ) -> None:
        super().__init__(beta, negatives, length_normalized, weight, direction)
        if reference_pairs not in get_args(ReferencePairs):
            raise ValueError(f"KTO.reference_pairs={reference_pairs!r}: choose {' or '.join(get_args(ReferencePairs))}")
        check_factor(self, "desirable_weight", desirable_weight)
        check_factor(self, "undesirable_weight", undesirable_weight)
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.reference_pairs = reference_pairs

    @property
    def statistic_of_mismatched_pairs(self) -> bool:
        return self.reference_pairs == "mismatched"

    def statistic_candidates(self, batch: Batch) -> Tensor | None:
        if self.statistic_of_mismatched_pairs:
            return None
        return only_candidates(batch, 2) & ~only_candidates(batch, 1)

    def statistic(self, chunk: Chunk) -> Tensor:
        candidate = 0 if self.statistic_of_mismatched_pairs else 1
        ratio = chunk.policy_logps[:, candidate] - chunk.reference[:, candidate]
        return ratio / chunk.lengths[:, candidate] if self.length_normalized else ratio

    def forward(self, chunk: Chunk) -> Tensor:
        reference_point = chunk.statistics[self.name].detach().clamp(min=0)
        weights = self.desirable_weight, self.undesirable_weight
        return kto_loss(*self.ratios(chunk), reference_point, self.beta, *weights)

    @torch.no_grad()
    def metrics(self, chunk: Chunk) -> dict[str, Tensor]:
        """And the mean log-ratio of the pairs, which is z where it is positive, in nats."""
        return {**super().metrics(chunk), "reference_point": chunk.statistics[self.name].expand(len(chunk))}


class CPO(PreferenceLoss):
    """:func:`cpo_loss` plus the NLL of the positive, a mean over its tokens.

    Args:
        nll_weight: factor of the NLL term.

    Raises:
        ValueError: a negative factor.
    """

    name = "cpo"
    uses_reference = False

    def __init__(
        self,
        beta: float = 0.1,
        negatives: Negatives = "all",
        length_normalized: bool = False,
        weight: float = 1.0,
        nll_weight: float = 1.0,
        direction: TextDirection = "passage_given_query",
    ) -> None:
        super().__init__(beta, negatives, length_normalized, weight, direction)
        check_factor(self, "nll_weight", nll_weight)
        self.nll_weight = nll_weight

    def forward(self, chunk: Chunk) -> Tensor:
        nll = sft_loss(chunk.policy_logps[:, 0], chunk.lengths[:, 0])
        return cpo_loss(*self.split(chunk, chunk.policy_logps), self.beta) + self.nll_weight * nll


class SimPO(PreferenceLoss):
    """:func:`simpo_loss`; always over means of tokens.

    Args:
        gamma: γ, the margin asked for.
    """

    name = "simpo"
    uses_reference = False

    def __init__(
        self,
        beta: float = 2.0,
        negatives: Negatives = "all",
        gamma: float = 1.0,
        weight: float = 1.0,
        direction: TextDirection = "passage_given_query",
    ) -> None:
        super().__init__(beta, negatives, True, weight, direction)
        self.gamma = gamma

    def forward(self, chunk: Chunk) -> Tensor:
        return simpo_loss(*self.split(chunk, chunk.policy_logps), self.beta, self.gamma)
