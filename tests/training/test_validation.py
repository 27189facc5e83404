"""Two ranks rank the corpus as one does, equal cosines and a batch that both embed included."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

from ullme.distributed import world
from ullme.training.retrieval_metrics import ranking_metrics
from ullme.training.validation import CorpusRanking

QUERIES, PASSAGES, WIDTH, DEPTH, BATCH = 7, 41, 3, 12, 4


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """Components of -1, 0 and 1, so that many cosines are equal and none is rounded."""
    draw = torch.Generator().manual_seed(0)
    queries, passages = (torch.randint(-1, 2, (n, WIDTH), generator=draw).float() for n in (QUERIES, PASSAGES))
    queries[:, 0] = 1.0  # a row of zeros stands for one that was not embedded
    passages[5] = queries[1]  # its own copy would be the nearest
    return queries, passages


def batches(number: int) -> list[torch.Tensor]:
    """This rank's batches; where they are not as many on every rank, the first comes twice."""
    rank, ranks = world()
    every = list(torch.randperm(number, generator=torch.Generator().manual_seed(1)).split(BATCH))
    return [*every, *every[: -len(every) % ranks]][rank::ranks]


def rank_all(left_out_batches: int = 0) -> tuple[bool, torch.Tensor, int]:
    queries, passages = embeddings()
    copies = [None, 5, None, *[None] * (QUERIES - 3)]
    ranking = CorpusRanking(QUERIES, PASSAGES, WIDTH, DEPTH, torch.device("cpu"), copies)
    for places in batches(QUERIES):
        ranking.add_queries(queries[places], places)
    mine = batches(PASSAGES)
    for places in mine[left_out_batches:]:
        ranking.add_passages(passages[places], places)
    return ranking.merge_ranks(), ranking.best(), len(mine)


def both() -> list[tuple[bool, torch.Tensor, int]]:
    return [rank_all(), rank_all(left_out_batches=1)]


@pytest.mark.distributed
def test_two_ranks_rank_as_one(tmp_path):
    complete, alone, number = rank_all()
    queries, passages = embeddings()
    cosines = queries @ passages.T
    assert cosines[1, 5] == cosines[1].max()
    cosines[1, 5] = -torch.inf  # its own copy
    ordered = cosines.sort(dim=1, descending=True, stable=True)
    assert complete
    assert torch.equal(alone, ordered.indices[:, :DEPTH])
    at_the_cut = ordered.values[:, DEPTH - 1] == ordered.values[:, DEPTH]
    assert at_the_cut.any(), "without ties at the cut-off the test says nothing about them"
    relevant = [{int(ordered.indices[n, n + 1]): 1, n: 2} for n in range(QUERIES)]
    for (complete, found, own), (partly, *_) in on_ranks(2, tmp_path, both):
        assert (complete, partly, own) == (True, False, -(-number // 2))
        assert torch.equal(found, alone)
        assert ranking_metrics(found, relevant) == ranking_metrics(alone, relevant)
    assert number % 2, "the last rank has a batch that the first has too"


def test_cosines_are_not_rounded_by_autocast():
    """Lightning runs validation in the run's precision; two cosines that bfloat16 cannot tell apart keep their order."""
    near = torch.nn.functional.normalize(torch.tensor([[1.0, 2e-2], [1.0, 1e-2], [1.0, 0.0]]), dim=1)
    assert (near @ near.T)[2].bfloat16().unique().numel() == 1
    ranking = CorpusRanking(1, 3, 2, 3, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        ranking.add_queries(near[2:], torch.tensor([0]))
        ranking.add_passages(near, torch.arange(3))
    assert ranking.best().tolist() == [[2, 1, 0]]
