"""How well the teacher of a KL ranks the positives, measured on some rows before training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from ullme.batch import PARTS, Batch, Direction
from ullme.distributed import all_reduce_max, any_rank, mean_over_ranks, world
from ullme.engine.reference import MissingLikelihoodsError
from ullme.engine.scoring import score_by_chunk
from ullme.losses.kl import KL
from ullme.losses.ranking import rank_of_first
from ullme.utils.modes import evaluation_mode

if TYPE_CHECKING:
    from ullme.engine.objective import Objective
    from ullme.models.ullme import ULLME

# Queries, over all ranks, that are measured at the most; and after how many the result is checked, to stop early.
ROWS, BLOCK = 100, 20
# Queries in one forward of each rank.
_CHUNK = 4


@dataclass(frozen=True)
class TeacherQuality:
    """How a teacher ranks positives.

    Args:
        direction: what it scores by.
        accuracy: the share of queries whose positive it ranks first.
        mrr: the mean reciprocal rank of the positive.
        candidates: C.
        rows: queries measured.
    """

    direction: Direction
    accuracy: float
    mrr: float
    candidates: int
    rows: int

    @property
    def chance(self) -> float:
        """The accuracy of a teacher that knows nothing."""
        return 1 / self.candidates

    @property
    def deviations(self) -> float:
        """By how many of chance's standard deviations the accuracy is above chance."""
        return (self.accuracy - self.chance) / math.sqrt(self.chance * (1 - self.chance) / self.rows)

    @property
    def at_chance(self) -> bool:
        """Whether so many right answers, or more, come by chance in one case of forty."""
        return self.deviations < 2

    def __str__(self) -> str:
        return (
            f"the teacher of the KL ({self.direction}) ranks {100 * self.accuracy:.0f} % of {self.rows} positives "
            f"first among {self.candidates} candidates (chance {100 * self.chance:.0f} %), MRR {self.mrr:.2f}"
        )

    @property
    def remedy(self) -> str:
        """What to change about a teacher at chance."""
        other = "" if self.direction == "query_given_passage" else "direction=query_given_passage, "
        return f"such a KL teaches noise; try {other}another LLM, or a kl_weight of 0"


def taught_term(objective: Objective) -> KL | None:
    """The KL of an objective, whose teacher is measured; None where it has none."""
    return next((term for term in objective.chunk_terms if isinstance(term, KL)), None)


@torch.no_grad()
def measure_teacher(objective: Objective, model: ULLME, batches: Iterable[Batch]) -> TeacherQuality | None:
    """Rank the candidates of up to :data:`ROWS` queries by the likelihoods of the objective's KL.

    A teacher that is far above chance after some queries is not measured on more; nor is one beyond the queries whose
    likelihoods a cache holds, where nothing computes them (``reference: cached``). Chance follows from the number of
    candidates, so batches with another number than the first are passed over, as are those without labels.

    Args:
        objective: prepared (:meth:`Objective.check`).
        model: the policy, on its device; every rank calls this with its own.
        batches: this rank's, with the rows for the likelihoods; every rank has as many. Whether a dataset has the KL
            among its terms does not matter.

    Returns:
        None where there is no KL, one candidate only, or no positive or no likelihood is known.
    """
    term = taught_term(objective)
    if term is None:
        return None
    found: list[torch.Tensor] = []
    quality = None
    size = max(1, BLOCK // world()[1])
    for batch in islice(batches, ROWS):
        candidates = batch.num_candidates if quality is None else quality.candidates
        if not batch.labelled or batch.num_candidates < 2 or batch.num_candidates != candidates:
            continue
        queries = -all_reduce_max(-len(batch), model.device)  # a rank's part of an epoch's last batch may be larger
        for start in range(0, queries, size):
            part = batch[start : min(start + size, queries)].to(model.device)
            try:
                scores = ranking_scores(objective, term, model, part)
            except MissingLikelihoodsError:  # training may end before these rows; if not, the step says so
                scores = None
            if any_rank(scores is None, part.row_ids.device) or scores is None:
                return quality
            found.append(torch.stack(rank_of_first(scores)))
            accuracy, mrr = (mean_over_ranks(values).item() for values in torch.cat(found, 1))
            rows = sum(part.shape[1] for part in found) * world()[1]
            quality = TeacherQuality(term.direction, accuracy, mrr, batch.num_candidates, rows)
            if rows >= ROWS or quality.deviations > 5:
                return quality
    return quality


def ranking_scores(objective: Objective, term: KL, model: ULLME, batch: Batch) -> torch.Tensor:
    """(b, C) float64 what the term ranks by, before its temperature, in nats a token.

    Args:
        objective: prepared (:meth:`Objective.check`).
        term: of the objective.
        model: on its device.
        batch: on the same device, with the rows for the likelihoods.
    """
    everything = torch.ones(batch.passage_keys.shape, dtype=torch.bool)
    chunks = [slice(n, min(n + _CHUNK, len(batch))) for n in range(0, len(batch), _CHUNK)]
    total = torch.zeros(everything.shape, dtype=torch.double, device=batch.row_ids.device)
    with evaluation_mode(model):
        for kind, sign in PARTS[term.direction].items():
            if term.uses_reference:
                logps = objective.reference.logps(model, batch, everything, objective.share_prompts, kind, chunks)
            else:
                logps = score_by_chunk(model, batch, everything, objective.share_prompts, kind, chunks)
            total += sign * logps
    return total / batch.generation_rows(next(iter(PARTS[term.direction]))).lengths(everything.shape)
