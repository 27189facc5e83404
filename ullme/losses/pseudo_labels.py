"""InfoNCE on pseudo-labels: the candidate that the pre-trained LLM finds best stands in for a positive."""

from __future__ import annotations

import torch
from torch import Tensor

from ullme.batch import Direction, Representations
from ullme.distributed import gather_sizes
from ullme.losses.base import TextDirection, check_factor, check_text_direction
from ullme.losses.distillation import mean_of_scored
from ullme.losses.info_nce import InfoNCE


def best_candidate(scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The best candidate of each query, and by how much it is better than the best one of another text.

    Args:
        scores: (B, C), higher is better.
        keys: (B, C) hashes of the candidates' texts.

    Returns:
        (B,) which candidate, and (B,) its margin, not negative; −inf where all candidates are one text.
    """
    best, choice = scores.max(1)
    same = keys == keys.gather(1, choice[:, None])
    second = scores.masked_fill(same, float("-inf")).amax(1)
    return choice, torch.where(same.all(1), float("-inf"), best - second)


class PseudoLabelInfoNCE(InfoNCE):
    """:class:`InfoNCE` for queries whose positive nobody knows.

    The teacher, the pre-trained LLM, scores a query's candidates by a likelihood (UPR, arXiv 2204.07496). Its best
    candidate is taken for the positive, if it is better than the second by ``margin``; the query's other candidates
    and, over all ranks, the other queries' passages are negatives. The mean is over the queries that pass, of the
    global batch. The scores are kept in ``cache_reference`` like every likelihood of the reference.

    Args:
        temperature: τ, as for InfoNCE.
        margin: what the best candidate must be ahead of the second, in nats a token; 0 takes every query.
        direction: what the teacher scores by: log π(q|p) or log π(p|q), each a mean over the tokens that are scored.
        in_batch_negatives: as for InfoNCE.
        mask_duplicates: likewise.
        use_labels: take a labelled batch's known positives in place of the teacher's, all of them: for a mixture of
            datasets with and without labels.
        weight: λ.
        mask_siblings: as for InfoNCE.

    Raises:
        ValueError: a temperature that is not positive, a negative margin, or an unknown direction.
    """

    name = "pseudo_label_info_nce"
    needs_positive = False

    def __init__(
        self,
        temperature: float = 0.05,
        margin: float = 0.1,
        direction: TextDirection = "query_given_passage",
        in_batch_negatives: bool = True,
        mask_duplicates: bool = True,
        use_labels: bool = False,
        weight: float = 1.0,
        mask_siblings: bool = True,
    ) -> None:
        super().__init__(temperature, in_batch_negatives, mask_duplicates, weight=weight, mask_siblings=mask_siblings)
        check_text_direction(self, direction)
        check_factor(self, "margin", margin)
        self.margin, self.use_labels = margin, use_labels
        self.teacher_direction: Direction | None = direction

    def compares_candidates(self, labelled: bool) -> bool:
        """One candidate has no margin, so that no query would count and the loss would be 0 throughout."""
        return not (self.use_labels and labelled)

    def pseudo_labels(self, reps: Representations) -> tuple[Tensor, Tensor]:
        """(B,) which candidate counts as each query's positive, and (B,) bool, whether the query counts."""
        if self.use_labels and reps.labelled:
            first = torch.zeros(len(reps), dtype=torch.long, device=reps.queries.device)
            return first, torch.ones_like(first, dtype=torch.bool)
        assert reps.teacher is not None
        choice, margin = best_candidate(reps.teacher, reps.passage_keys)
        return choice, margin >= self.margin

    def forward(self, reps: Representations) -> Tensor:
        """As :meth:`InfoNCE.forward`; 0 where no query of the global batch passes."""
        choice, counts = self.pseudo_labels(reps)
        losses = self.per_query(reps, choice, gather_sizes(len(reps), reps.queries.device))
        return mean_of_scored(torch.where(counts, losses, 0), counts)

    @torch.no_grad()
    def metrics(self, reps: Representations) -> dict[str, Tensor]:
        """The share of queries that pass, and of these, where positives are known, the share that is right; of the
        teacher's choices, also where ``use_labels`` takes the known positives in their place."""
        assert reps.teacher is not None
        choice, margin = best_candidate(reps.teacher, reps.passage_keys)
        counts = margin >= self.margin
        found = {"pseudo_label_share": mean_of_scored(counts.double(), torch.ones_like(counts))}
        if reps.labelled:  # a rank may have fewer queries that pass than another, or none
            found["pseudo_label_accuracy"] = mean_of_scored((counts & (choice == 0)).double(), counts)
        return found
