"""InfoNCE (arXiv 1807.03748), the paper's contrastive loss L_CL (arXiv 2408.03402, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ullme.batch import Representations
from ullme.distributed import gather, gather_sizes, global_mean_weight, world
from ullme.losses.base import RepresentationLoss


def info_nce(
    queries: Tensor, passages: Tensor, positives: Tensor, excluded: Tensor | None, temperature: float
) -> Tensor:
    """Mean over queries of −log exp(s⁺/τ) / Σ exp(s/τ), in nats.

    Args:
        queries: (B, D), of unit length for cosines.
        passages: (M, D), the positives and every negative.
        positives: (B,) index of each query's positive among the M.
        excluded: (B, M) bool, True where a passage is no negative of the query; never true for its positive.
        temperature: τ.

    Returns:
        A scalar in float32 (float64 for float64 inputs).
    """
    return _info_nce(queries, passages, positives, excluded, temperature).mean()


def _info_nce(
    queries: Tensor, passages: Tensor, positives: Tensor, excluded: Tensor | None, temperature: float
) -> Tensor:
    """(B,), each query's part of the mean that :func:`info_nce` is."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.to(wide) @ passages.to(wide).T / temperature
        if excluded is not None:
            scores = scores.masked_fill(excluded, float("-inf"))
        return cross_entropy(scores, positives, reduction="none")


class InfoNCE(RepresentationLoss):
    """Contrastive loss over hard negatives and, across all ranks, the other queries' passages.

    Args:
        temperature: τ; the paper gives none, 0.05 is common for cosines (arXiv 2104.08821).
        in_batch_negatives: use the passages of other queries too, of every rank; batches of a dataset that has
            ``in_batch_negatives: false`` of its own do not, whatever is said here.
        mask_duplicates: a passage whose text equals the query's positive is no negative, wherever it stands.
        bidirectional: add the loss of finding a positive's query among all queries, and halve the sum.
        weight: λ_CL.

    Raises:
        ValueError: a temperature that is not positive.
    """

    name = "info_nce"

    def __init__(
        self,
        temperature: float = 0.05,
        in_batch_negatives: bool = True,
        mask_duplicates: bool = True,
        bidirectional: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise ValueError(f"InfoNCE.temperature={temperature}: must be above 0")
        if bidirectional and not in_batch_negatives:
            raise ValueError(
                "InfoNCE.bidirectional=true needs in_batch_negatives=true: its negatives are other queries"
            )
        self.temperature = temperature
        self.in_batch_negatives = in_batch_negatives
        self.mask_duplicates = mask_duplicates
        self.bidirectional = bidirectional

    def forward(self, reps: Representations) -> Tensor:
        """The mean over this rank's queries, scaled so that the mean over ranks is the global mean.

        Args:
            reps: queries (B, D), passages (B, C, D).
        """
        sizes = gather_sizes(len(reps), reps.queries.device)
        first = torch.zeros(len(reps), dtype=torch.long, device=reps.queries.device)
        return self.per_query(reps, first, sizes).mean() * global_mean_weight(sizes)

    def per_query(self, reps: Representations, positive: Tensor, sizes: list[int]) -> Tensor:
        """(B,) the loss of each of this rank's queries, in nats.

        Args:
            reps: queries (B, D), passages (B, C, D).
            positive: (B,) which of a query's candidates counts as its positive.
            sizes: queries of each rank, from :func:`~ullme.distributed.gather_sizes`.
        """
        rank, _ = world()
        queries, keys = gather(reps.queries, sizes), gather(reps.passage_keys, sizes)
        passages, positive_of_all = gather(reps.passages, sizes), gather(positive, sizes)
        own = torch.arange(len(reps), device=queries.device) + sum(sizes[:rank])
        positive_keys = keys.gather(1, positive_of_all[:, None])[:, 0]
        places = own * passages.shape[1] + positive
        excluded = self._excluded(own, keys, positive_keys[own], places, reps.isolated)
        loss = _info_nce(reps.queries, passages.flatten(0, 1), places, excluded, self.temperature)
        if self.bidirectional:
            others = self._others(own, torch.arange(len(queries), device=own.device), reps.isolated)
            if self.mask_duplicates:
                others = others | self._same_text(positive_keys[own], positive_keys, own)
            answers = reps.passages[torch.arange(len(reps), device=own.device), positive]
            loss = (loss + _info_nce(answers, queries, own, others, self.temperature)) / 2
        return loss

    def _excluded(
        self, own: Tensor, keys: Tensor, positive_keys: Tensor, places: Tensor, isolated: Tensor | None
    ) -> Tensor:
        """(B, M) bool: what is no negative of each own query, out of the M = B_global * C passages."""
        owner = torch.arange(keys.numel(), device=keys.device) // keys.shape[1]
        excluded = self._others(own, owner, isolated)
        if self.mask_duplicates:
            excluded = excluded | self._same_text(positive_keys, keys.flatten(), places)
        return excluded

    def _others(self, own: Tensor, owner: Tensor, isolated: Tensor | None) -> Tensor:
        """(B, M) bool: what belongs to another query, for those queries that have no in-batch negatives."""
        alone = torch.full_like(own, not self.in_batch_negatives, dtype=torch.bool) if isolated is None else isolated
        return (alone | (not self.in_batch_negatives))[:, None] & (owner != own[:, None])

    @staticmethod
    def _same_text(mine: Tensor, others: Tensor, itself: Tensor) -> Tensor:
        """(B, M) bool: others with the same key as mine, except the entry that is mine."""
        same = others == mine[:, None]
        return same.scatter(1, itself[:, None], False)
