"""InfoNCE (arXiv 1807.03748), the paper's contrastive loss L_CL (arXiv 2408.03402, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ullme.batch import NO_TEXT, ColumnKind, Representations
from ullme.distributed import gather, gather_sizes, global_mean_weight, world
from ullme.losses.base import RepresentationLoss, check_positive
from ullme.losses.false_negatives import FalseNegatives, above_margin, known_positives, one_place_per_text

Positives = Literal["one", "all"]


def info_nce(
    queries: Tensor, passages: Tensor, positives: Tensor, excluded: Tensor | None, temperature: float
) -> Tensor:
    """Mean over queries of −log Σ exp(s⁺/τ) / Σ exp(s/τ), in nats.

    Args:
        queries: (B, D), of unit length for cosines.
        passages: (M, D), the positives and every negative.
        positives: (B,) index of each query's positive among the M; or (B, M) bool, True on each of its positives, at
            least one, whose exponentials are summed in the numerator (MIL-NCE, arXiv 1912.06430, eq. 1).
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
        if positives.dtype == torch.bool:
            return scores.logsumexp(1) - scores.masked_fill(~positives, float("-inf")).logsumexp(1)
        return cross_entropy(scores, positives, reduction="none")


def _all_passages(passages: Tensor, extra: Tensor | None) -> Tensor:
    """(B · C + B · K, ...) of all passages: first of candidates (B, C, ...), then of extra positives (B, K, ...)."""
    return passages.flatten(0, 1) if extra is None else torch.cat([passages.flatten(0, 1), extra.flatten(0, 1)])


class InfoNCE(RepresentationLoss):
    """Contrastive loss over hard negatives and, across all ranks, the other queries' passages.

    Args:
        temperature: τ; the paper gives none, 0.05 is common for cosines (arXiv 2104.08821).
        in_batch_negatives: use the passages of other queries too, of every rank; batches of a dataset that has
            ``in_batch_negatives: false`` of its own do not, whatever is said here.
        mask_duplicates: a passage whose text equals the query's positive is no negative, wherever it stands.
        bidirectional: add the loss of finding a positive's query among all queries, and halve the sum.
        weight: λ_CL.
        mask_siblings: a positive of another row with the same query is no negative, wherever it stands in the global
            batch.
        positives: ``one``: the numerator has the row's positive. ``all``: it has the positives that were drawn of the
            row (``data.num_positives``) and of all rows of the global batch with the same query, each text once, and
            they are negatives of the other queries. The second half of ``bidirectional`` has the first positive only.
        false_negatives: leave out negatives that score too high; null leaves out none.

    Raises:
        ValueError: a temperature that is not positive, an unknown choice, or options that exclude each other.
    """

    name = "info_nce"

    def __init__(
        self,
        temperature: float = 0.05,
        in_batch_negatives: bool = True,
        mask_duplicates: bool = True,
        bidirectional: bool = False,
        weight: float = 1.0,
        mask_siblings: bool = True,
        positives: Positives = "one",
        false_negatives: FalseNegatives | None = None,
    ) -> None:
        super().__init__(weight)
        check_positive(self, "temperature", temperature)
        if bidirectional and not in_batch_negatives:
            raise ValueError(
                "InfoNCE.bidirectional=true needs in_batch_negatives=true: its negatives are other queries"
            )
        if positives not in get_args(Positives):
            raise ValueError(f"InfoNCE.positives={positives!r}: choose {' or '.join(get_args(Positives))}")
        if positives == "all" and not mask_siblings:
            raise ValueError(
                "InfoNCE.positives=all needs mask_siblings=true: the positives of rows with the same query cannot be "
                "positives and negatives"
            )
        self.temperature = temperature
        self.in_batch_negatives = in_batch_negatives
        self.mask_duplicates = mask_duplicates
        self.bidirectional = bidirectional
        self.mask_siblings = mask_siblings
        self.positives: Positives = positives
        self.uses_extra_positives = positives == "all"
        self.false_negatives = false_negatives
        source = None if false_negatives is None else false_negatives.scores
        self.uses_guide = source == "guide"
        self.needs_negatives = source == "column"  # a teacher scores a query's own candidates only
        self.columns = (false_negatives.column,) if false_negatives is not None and source == "column" else ()

    def check_columns(self, kinds: Mapping[str, ColumnKind], num_hard_negatives: int) -> None:
        for column in self.columns:
            if kinds[column] != "candidate":
                raise ValueError(
                    f"InfoNCE.false_negatives.column={column!r} has one number a query; it needs one a candidate, "
                    "a list with one for each positive and then each negative"
                )

    def forward(self, reps: Representations) -> Tensor:
        """The mean over this rank's queries, scaled so that the mean over ranks is the global mean.

        Args:
            reps: queries (B, D), passages (B, C, D).
        """
        sizes = gather_sizes(len(reps), reps.queries.device)
        return self.per_query(reps, self._first(reps), sizes).mean() * global_mean_weight(sizes)

    def per_query(self, reps: Representations, positive: Tensor, sizes: list[int]) -> Tensor:
        """(B,) the loss of each of this rank's queries, in nats.

        Args:
            reps: queries (B, D), passages (B, C, D).
            positive: (B,) which of a query's candidates counts as its positive.
            sizes: queries of each rank, from :func:`~ullme.distributed.gather_sizes`.
        """
        whole, positive_keys, own = self._gather(reps, positive, sizes)
        places = own * reps.passages.shape[1] + positive
        numerator, excluded, too_high = self._masks(reps, whole, positive_keys, own, places)
        passages = _all_passages(whole.passages, whole.extra_positives)
        targets = numerator if self.positives == "all" else places
        loss = _info_nce(reps.queries, passages, targets, excluded | too_high, self.temperature)
        if self.bidirectional:
            others = self._others(own, torch.arange(len(whole), device=own.device), reps.isolated)
            if self.mask_duplicates:
                others = others | (positive_keys == positive_keys[own][:, None, :1]).any(2)
            if self.mask_siblings and whole.query_keys is not None:
                others = others | (whole.query_keys == whole.query_keys[own][:, None])
            others = others.scatter(1, own[:, None], False)
            answers = reps.passages[torch.arange(len(reps), device=own.device), positive]
            loss = (loss + _info_nce(answers, whole.queries, own, others, self.temperature)) / 2
        return loss

    @torch.no_grad()
    def metrics(self, reps: Representations) -> dict[str, Tensor]:
        """The mean number of positives drawn of a row, where there may be several; and the share of the negatives that
        :class:`~ullme.losses.false_negatives.FalseNegatives` leaves out."""
        found: dict[str, Tensor] = {}
        sizes = gather_sizes(len(reps), reps.queries.device)
        if self.uses_extra_positives and reps.extra_positive_keys is not None:
            drawn = 1 + (reps.extra_positive_keys != NO_TEXT).sum(1)
            found["positives_per_row"] = drawn.double().mean() * global_mean_weight(sizes)
        if self.false_negatives is None:
            return found
        positive = self._first(reps)
        whole, positive_keys, own = self._gather(reps, positive, sizes)
        places = own * reps.passages.shape[1] + positive
        numerator, excluded, too_high = self._masks(reps, whole, positive_keys, own, places)
        negatives = (~excluded & ~numerator).sum(1)
        share = (too_high & ~excluded).sum(1) / negatives.clamp(min=1).double()
        return {**found, "false_negative_share": share.mean() * global_mean_weight(sizes)}

    @staticmethod
    def _first(reps: Representations) -> Tensor:
        return torch.zeros(len(reps), dtype=torch.long, device=reps.queries.device)

    def _gather(
        self, reps: Representations, positive: Tensor, sizes: list[int]
    ) -> tuple[Representations, Tensor, Tensor]:
        """The representations of all ranks, with extra positives only where they count; (B_global, 1 + K) the keys of
        all rows' positives; and (B,) the own queries' places."""
        if not self.uses_extra_positives:
            reps = replace(reps, extra_positives=None, extra_positive_keys=None, guide_extra_positives=None)
        whole, positive_of_all = reps.gather(sizes), gather(positive, sizes)
        own = torch.arange(len(reps), device=positive.device) + sum(sizes[: world()[0]])
        first = whole.passage_keys.gather(1, positive_of_all[:, None])
        keys = first if whole.extra_positive_keys is None else torch.cat([first, whole.extra_positive_keys], dim=1)
        return whole, keys, own

    def _masks(
        self, reps: Representations, whole: Representations, positive_keys: Tensor, own: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Three (B, M) bool masks of the M = B_global · C passages, then extra positives, for each own query.

        Returns:
            What stands in the numerator; what is no negative, by text or by option; and what scores too high for one.
        """
        keys = _all_passages(whole.passage_keys, whole.extra_positive_keys)
        owners = torch.arange(len(whole), device=own.device)[:, None]
        extra = None if whole.extra_positive_keys is None else owners.expand_as(whole.extra_positive_keys)
        owner = _all_passages(owners.expand_as(whole.passage_keys), extra)
        excluded = self._others(own, owner, reps.isolated)
        numerator = torch.zeros_like(excluded).scatter(1, places[:, None], True)
        mine = positive_keys[own, 0]
        if self.mask_siblings:
            known = known_positives(own, whole.query_keys, positive_keys, keys)
            if self.positives == "all":
                count = 0 if extra is None else extra.shape[1]
                own_extra = whole.passage_keys.numel() + own[:, None] * count + torch.arange(count, device=own.device)
                numerator = one_place_per_text(known, keys, torch.cat([places[:, None], own_extra], dim=1))
            # the text of the own positive is a matter of mask_duplicates
            excluded = excluded | (known & (keys != mine[:, None]))
        if self.mask_duplicates:
            excluded = excluded | (keys == mine[:, None])
        if extra is not None:
            excluded = excluded | (keys == NO_TEXT)
        excluded = excluded & ~numerator
        return numerator, excluded, self._too_high(reps, whole, own, places) & ~numerator

    def _others(self, own: Tensor, owner: Tensor, isolated: Tensor | None) -> Tensor:
        """(B, M) bool: what belongs to another query, for those queries that have no in-batch negatives."""
        alone = torch.full_like(own, not self.in_batch_negatives, dtype=torch.bool) if isolated is None else isolated
        return (alone | (not self.in_batch_negatives))[:, None] & (owner != own[:, None])

    @torch.no_grad()
    def _too_high(self, reps: Representations, whole: Representations, own: Tensor, places: Tensor) -> Tensor:
        """(B, M) bool: what scores too high for a negative."""
        rule = self.false_negatives
        shape = len(own), len(_all_passages(whole.passage_keys, whole.extra_positive_keys))
        if rule is None:
            return torch.zeros(shape, dtype=torch.bool, device=own.device)
        if rule.scores == "column":
            column, c = reps.columns[rule.column], whole.passage_keys.shape[1]
            self.check_columns({rule.column: "candidate" if column.dim() == 2 else "query"}, c - 1)
            scores = torch.full(shape, float("nan"), dtype=column.dtype, device=own.device)
            scores.scatter_(1, own[:, None] * c + torch.arange(c, device=own.device), column)
        else:
            guided = rule.scores == "guide"
            queries = reps.guide_queries if guided else reps.queries
            passages = whole.guide_passages if guided else whole.passages
            extra = whole.guide_extra_positives if guided else whole.extra_positives
            assert queries is not None
            assert passages is not None
            wide = torch.promote_types(queries.dtype, torch.float32)
            with torch.autocast(queries.device.type, enabled=False):
                scores = queries.to(wide) @ _all_passages(passages, extra).to(wide).T
        return above_margin(scores, scores.gather(1, places[:, None])[:, 0], rule.margin, rule.ratio)
