"""The host does not wait for the device within a step, and the device is the same everywhere."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from device_without_values import DEVICE, CopiesToDevice, on_device
from test_gradcache import make_batch, with_extra_positives
from test_objective import with_generation
from tiny import make_tokenizer

from ullme import distributed
from ullme.engine.finite import FiniteChecks
from ullme.engine.gradcache import chunk_slices, embed_batch, microbatch_rows
from ullme.engine.objective import Objective
from ullme.losses import DPO, KL, KTO, MNTP, InfoNCE
from ullme.training.validation import CorpusRanking


@pytest.fixture
def without_autocast(monkeypatch):
    """The meta device has none."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.usefixtures("without_autocast")
@pytest.mark.parametrize("how", ["chunks", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_step_waits_for_nothing_but_the_choice_of_candidates_and_its_last_check(make_model, monkeypatch, how):
    batch, objective = with_generation(make_batch()), Objective([InfoNCE(), DPO(), KTO(), KL()])
    batch = replace(
        batch, query_keys=torch.tensor([1, 2, 1, 3, 1])
    )  # of which a row's own positive is not the only one
    model = on_device(make_model("llama", lora_dropout=0.1).train())
    scoring, checked = objective.scoring(batch), []
    monkeypatch.setattr(objective, "scoring", lambda _: scoring)
    monkeypatch.setattr(FiniteChecks, "raise_if_any", lambda self, _: checked.extend(self.seen))
    moved = batch.to(DEVICE)
    chunks, microbatches = chunk_slices(moved, 2, None), microbatch_rows(moved, 40)
    assert min(len(chunks), len(microbatches)) > 2
    with CopiesToDevice() as copies:
        if how == "whole":
            logs = objective.full_batch(model, moved)
        else:
            logs = objective.grad_cache(model, moved, chunks, microbatches=microbatches, num_retained=1)
    assert copies.waited == 0
    assert 0 < copies.passed < 60
    assert {value.device for value in logs.values()} == {DEVICE}  # Lightning reduces them over ranks
    assert {name for name, *_ in checked} == {"info_nce", "dpo", "kto", "kl"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_positives_of_rows_with_the_same_query_are_not_waited_for():
    """Nor several of one row; how many there are is known on the device alone."""
    batch = replace(with_extra_positives(make_batch()), query_keys=torch.tensor([1, 2, 1, 3, 1])).to(DEVICE)
    reps = embed_batch(lambda rows: torch.empty(len(rows), 8, device=DEVICE), batch)
    with CopiesToDevice() as copies, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        assert InfoNCE(positives="all", bidirectional=True)(reps).device == DEVICE
    assert copies.waited == 0


def test_the_choice_of_masked_tokens_waits_for_nothing():
    rows = make_batch().queries.to(DEVICE)
    with CopiesToDevice() as copies:
        replaced, masked = MNTP().mask(rows, make_tokenizer(), distributed.random_seed(DEVICE))
    assert copies.waited == 0
    assert {replaced.input_ids.device, masked.device} == {DEVICE}


def test_a_wait_would_be_noticed(make_model):
    """Without the masks on the host, the length of rows must be read from the device."""
    model = on_device(make_model("llama"))
    rows = make_batch().queries
    moved = rows.to(DEVICE)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        model(moved.input_ids, moved.attention_mask, host=moved.host)
        with pytest.raises(NotImplementedError, match="meta"):
            model(moved.input_ids, moved.attention_mask)


@pytest.mark.usefixtures("without_autocast")
def test_validation_waits_once_after_all_batches():
    """It reads nothing before the last batch is ranked."""
    ranking = CorpusRanking(6, 9, 8, 5, DEVICE, [0, *[None] * 5])
    batches = torch.arange(9, device=DEVICE).split(2)
    with CopiesToDevice() as copies:
        ranking.add_queries(torch.empty(6, 8, device=DEVICE), torch.arange(6, device=DEVICE))
        for places in batches:
            ranking.add_passages(torch.empty(len(places), 8, device=DEVICE), places)
        with pytest.raises(RuntimeError, match="meta"):
            ranking.merge_ranks()
    assert len(batches) == 5
    assert copies.waited == 0


class Collectives:
    """Stands in for torch.distributed in a process group of two that, as NCCL, takes the device's tensors only."""

    ReduceOp = dist.ReduceOp

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        def collective(*args, **kwargs):
            flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
            self.seen += [x for x in flat if isinstance(x, torch.Tensor)]

        return collective


WHOLE = torch.nn.Parameter(torch.empty(3, device=DEVICE))
CALLS = {
    "all_reduce_max": lambda: distributed.all_reduce_max(3, DEVICE),
    "any_rank": lambda: distributed.any_rank(True, DEVICE),
    "each_on_any_rank": lambda: distributed.each_on_any_rank([True, False], DEVICE),
    "random_seed": lambda: distributed.random_seed(DEVICE),
    "gather_messages": lambda: distributed.gather_messages("a message", DEVICE),
    "gather_sizes": lambda: distributed.gather_sizes(4, DEVICE),
    "gather": lambda: distributed.gather(torch.empty(2, 3, device=DEVICE), [2, 3]),
    "merge_unit_rows": lambda: distributed.merge_unit_rows(torch.empty(2, 3, device=DEVICE)),
    "broadcast": lambda: distributed.broadcast([WHOLE]),
    "average_gradients": lambda: distributed.average_gradients([WHOLE]),
    "mean_of_each": lambda: distributed.mean_of_each({"a": torch.empty((), device=DEVICE)}),
    "mean_over_ranks": lambda: distributed.mean_over_ranks(torch.empty(3, device=DEVICE)),
}


@pytest.mark.parametrize("name", CALLS)
def test_collectives_are_given_tensors_of_the_device(name, monkeypatch):
    collectives = Collectives()
    monkeypatch.setattr(distributed, "dist", collectives)
    monkeypatch.setattr(distributed, "world", lambda: (0, 2))
    with suppress(
        NotImplementedError, RuntimeError
    ):  # it goes on to read what it was sent, of which there are no values
        CALLS[name]()
    assert collectives.seen
    assert {x.device for x in collectives.seen} == {DEVICE}
