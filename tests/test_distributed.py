"""Two ranks give the gradient of one process with the same global batch, even where they hold unevenly many queries."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_gradcache import assert_same_gradients, gradients, make_batch, with_extra_positives
from test_objective import OBJECTIVES, with_generation

from ullme.batch import Batch
from ullme.distributed import (
    all_reduce_max,
    any_rank,
    average_gradients,
    mean_of_each,
    mean_over_ranks,
    merge_unit_rows,
    world,
)
from ullme.engine.finite import NotFiniteError
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.losses import DPO, KL, MNTP, CoSENT, CosineRegression, DistillationKL, InfoNCE, MarginMSE
from ullme.losses.false_negatives import FalseNegatives
from ullme.models import ULLME
from ullme.planning.auto_chunk import Chunking, shrink_until_it_fits

NAMES = (
    "cl",
    "cl_unmasked",
    "isolated",
    "grl",
    "kto",
    "both_directions",
    "query_teacher",
    "pseudo_labels",
    "matryoshka",
)
NAMES += (
    "siblings",
    "all_positives",
    "several_of_a_row",
    "student_margin",
    "column_margin",
    "guide_margin",
    "distillation",
    "scored_pairs",
    "masked_tokens",
)
LIMITS = {f"{name}_margin": FalseNegatives(-0.1, scores=name) for name in ("student", "column", "guide")}


def make_objective(name: str) -> Objective:
    if name in OBJECTIVES:
        return Objective(OBJECTIVES[name]())
    if name in LIMITS:
        return Objective([InfoNCE(false_negatives=LIMITS[name])])
    if name == "all_positives":
        return Objective([InfoNCE(positives="all")])
    if name == "several_of_a_row":
        rule = FalseNegatives(-0.1, scores="guide")
        return Objective([InfoNCE(positives="all", bidirectional=True, false_negatives=rule), DPO()])
    if name == "distillation":
        return Objective([DistillationKL(), MarginMSE(weight=0.1)])
    if name == "masked_tokens":
        return Objective([InfoNCE(), MNTP(0.5)])
    if name == "scored_pairs":
        return Objective([CoSENT(column="trust"), CosineRegression(column="trust")])
    return Objective([InfoNCE(bidirectional=name != "isolated", mask_duplicates=name != "cl_unmasked")])


def global_batch(name: str) -> Batch:
    """Five queries; the first one's positive is also a negative of the last and the positive of the fourth."""
    batch = with_generation(make_batch())
    batch = with_extra_positives(batch) if name == "several_of_a_row" else batch
    keys = batch.passage_keys.clone()
    keys[4, 1] = keys[3, 0] = keys[0, 0]
    isolated = torch.tensor([False, True, False, False, True]) if name == "isolated" else None
    same = (
        torch.tensor([1, 2, 3, 4, 2]) if name in ("siblings", "all_positives", "several_of_a_row") else None
    )  # on two ranks
    nan = float("nan")
    scores = torch.tensor([[1, 0, nan], [1, 2, 0], [nan] * 3, [0, 1, 1], [3, nan, 0]])
    columns = {"score": scores, "trust": torch.tensor([0.1, nan, 0.9, 0.1, 0.5])}
    return replace(batch, passage_keys=keys, isolated=isolated, query_keys=same, columns=columns)


def load(folder: str, state: dict) -> ULLME:
    model = ULLME(folder, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    model.load_state_dict(state, strict=False)
    return model.double().train()


def work(borders: list[int], folder: str, state: dict) -> dict:
    rank, ranks = world()
    model = load(folder, state)
    results = {}
    for name in NAMES:
        batch = global_batch(name)[borders[rank] : borders[rank + 1]]
        torch.manual_seed(rank)  # which tokens are masked is rank 0's to say
        logs = make_objective(name).grad_cache(model, batch, chunk_slices(batch, 2, None))
        average_gradients([p for p in model.parameters() if p.requires_grad])
        means = torch.stack([logs[key].double() for key in sorted(logs)])
        dist.all_reduce(means)
        results[name] = (dict(zip(sorted(logs), (means / ranks).tolist(), strict=True)), gradients(model))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    "borders", [[0, 3, 5], pytest.param([0, 1, 3, 5], marks=pytest.mark.slow)], ids=["2 ranks", "3 ranks"]
)
def test_ranks_change_no_gradient(borders, make_model, tmp_path):
    model = make_model().double().train()
    state = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
    results = on_ranks(len(borders) - 1, tmp_path, work, borders, model.options.model_name_or_path, state)[0]
    losses = []
    for name in NAMES:
        torch.manual_seed(0)
        logs = make_objective(name).full_batch(model, global_batch(name))
        expected = gradients(model)
        means, found = results[name]
        losses.append(means["loss"])
        compared = {key: value.item() for key, value in logs.items()}
        compared["loss"] = logs["loss"].item()
        assert {key: means[key] for key in compared} == pytest.approx(compared, rel=1e-5, abs=1e-6)
        assert_same_gradients(found, expected, 1e-5)  # Llama's norms round to float32
    assert len({round(loss, 4) for loss in losses}) == len(NAMES)  # duplicates and isolation matter


def stumble(folder: str, state: dict) -> str:
    """One query of rank 1 has a DPO that is not finite; rank 0 has nothing to complain of."""
    rank, _ = world()
    model, batch = load(folder, state), with_generation(make_batch())[2 * rank : 2 * rank + 2 + rank]

    class Wrong(DPO):
        def forward(self, chunk):
            return super().forward(chunk) * torch.where(chunk.row_ids == 3, float("nan"), 1.0)

    objective = Objective([InfoNCE(), Wrong(), KL()])
    with pytest.raises(NotFiniteError) as error:
        objective.grad_cache(model, batch, chunk_slices(batch, 1, None))
    dist.barrier()  # all of them are still here
    return str(error.value)


@pytest.mark.distributed
def test_a_nan_on_one_rank_stops_all_with_its_rows(make_model, tmp_path):
    model = make_model()
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    first, second = on_ranks(2, tmp_path, stumble, model.options.model_name_or_path, state)
    assert first == second
    assert first.startswith("rank 1: dpo is nan (training rows [3])")


def short_of_memory(folder: str, state: dict) -> tuple[int, int]:
    """Rank 1 runs out of memory in the middle of the first two trials, where rank 0 would wait for it."""
    rank, _ = world()
    model, tried = load(folder, state).float(), []
    forward = InfoNCE.forward

    def limited(self, reps):
        tried.append(reps.queries.shape[0])
        if rank == 1 and len(tried) <= 2:
            raise torch.OutOfMemoryError("no")
        return forward(self, reps)

    with mock.patch.object(InfoNCE, "forward", limited):
        found = shrink_until_it_fits(model, Objective([InfoNCE(), DPO()]), Chunking(400, 0, False), 3, 10, nullcontext)
    dist.barrier()  # all of them are still here
    return found.chunk_tokens, len(tried)


@pytest.mark.distributed
def test_a_trial_that_fails_on_one_rank_is_tried_smaller_by_all(make_model, tmp_path):
    model = make_model()
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    found = on_ranks(2, tmp_path, short_of_memory, model.options.model_name_or_path, state)
    assert found == [(100, 3), (100, 3)]


def talk() -> dict:
    rank, _ = world()
    unused = torch.nn.Parameter(torch.zeros(2))
    mine, large, half = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2))
    half = torch.nn.Parameter(half.detach().bfloat16())
    if rank == 0:  # as an expert that only rank 0's rows reached
        mine.grad = torch.full((3,), 6.0)
    large.grad, half.grad = torch.arange(5.0) * (rank + 1), torch.ones(2, dtype=torch.bfloat16) * rank
    with mock.patch("ullme.distributed.BUCKET_ELEMENTS", 4):
        average_gradients([unused, mine, large, half])
    rows = torch.zeros(4, 2)
    rows[rank] = torch.tensor([0.6, 0.8])
    rows[3] = torch.tensor([1.0, 0.0]) if rank else torch.tensor([0.0, 1.0])  # on several ranks, not quite equal
    return {
        "gradients": [p.grad for p in (unused, mine, large, half)],
        "rows": merge_unit_rows(rows),
        "any": any_rank(rank == 1, torch.device("cpu")),
        "most": all_reduce_max(rank + 4, torch.device("cpu")),
        "mean": mean_over_ranks(torch.arange(float(rank + 1))),
        "each": mean_of_each({"a": torch.tensor(float(rank)), "b": torch.tensor(0.5 * rank, dtype=torch.bfloat16)}),
    }


@pytest.mark.distributed
def test_what_ranks_tell_each_other(tmp_path):
    for found in on_ranks(3, tmp_path, talk):
        unused, mine, large, half = found["gradients"]
        assert unused is None
        torch.testing.assert_close(mine, torch.full((3,), 2.0))
        torch.testing.assert_close(large, torch.arange(5.0) * 2)
        torch.testing.assert_close(half, torch.ones(2, dtype=torch.bfloat16))
        expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0.0, 1.0]])
        assert torch.equal(found["rows"], expected)  # to the last bit; rank 0 was first at row 3
        assert found["any"] is True
        assert found["most"] == 6
        assert found["each"] == {"a": 1.0, "b": 0.5}
        assert found["each"]["b"].dtype == torch.bfloat16
        assert found["mean"] == pytest.approx((0 + 0 + 1 + 0 + 1 + 2) / 6)
