"""``auto``: what is chosen follows what is free, and changes no gradient."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_gradcache import assert_same_gradients, gradients, make_batch
from test_objective import with_generation
from tiny import recomputes_layers

from ullme.callbacks import GRL
from ullme.callbacks.gradcache import GradCache
from ullme.engine.gradcache import count_retained
from ullme.engine.objective import Objective
from ullme.losses import DPO, KL, InfoNCE
from ullme.planning import auto_chunk
from ullme.planning.auto_chunk import Chunking, largest_chunk, shrink_until_it_fits
from ullme.planning.flops import meta_model
from ullme.planning.memory import activations

GIB = 2**30
QUERY = 300  # tokens of the largest query with its passages


@pytest.fixture
def model(make_model):
    return make_model(gradient_checkpointing="auto").train()


def bytes_of(model, checkpointing: bool) -> float:
    counted = activations(meta_model(model.causal_lm.config, model.options), torch.float32)
    return counted.peak(1, checkpointing)


def test_more_memory_gives_larger_chunks_then_held_graphs_and_never_needless_checkpointing(model):
    fixed = auto_chunk._fixed(model, "cpu")
    each = bytes_of(model, False)
    small = largest_chunk(model, False, QUERY, None, free=2 * (fixed + 1.6 * 350 * each))
    large = largest_chunk(model, False, QUERY, None, free=2 * (fixed + 1.6 * 9000 * each))
    assert QUERY <= small.chunk_tokens <= 1.2 * 350
    assert (
        small.retained_tokens
        < small.chunk_tokens
        < large.chunk_tokens
        == auto_chunk._MOST["cpu"]
        < large.retained_tokens
    )
    assert not small.checkpointing
    assert not large.checkpointing


def test_checkpointing_where_the_smallest_chunk_would_not_fit(model):
    fixed = auto_chunk._fixed(model, "cpu")
    free = 2 * (fixed + 1.1 * 0.9 * QUERY * bytes_of(model, False))
    found = largest_chunk(model, False, QUERY, None, free=free)
    assert found.checkpointing
    assert found.chunk_tokens >= QUERY
    assert found.retained_tokens == 0
    free = 2 * (fixed + 1.1 * 9 * QUERY * bytes_of(model, False))
    fixed_choice = largest_chunk(model, False, QUERY, 10 * QUERY, free=free)  # chunks that the config gives
    assert fixed_choice.checkpointing
    assert fixed_choice.chunk_tokens == 10 * QUERY


def test_explicit_checkpointing_stays(make_model):
    for wanted in (True, False):
        model = make_model(gradient_checkpointing=wanted)
        assert largest_chunk(model, False, QUERY, None, free=10 * GIB).checkpointing is wanted


def test_nothing_fits(model):
    with pytest.raises(ValueError, match=r"chunk_tokens=auto.*smallest chunk.*data\.passage_max_length"):
        largest_chunk(model, False, 10**6, None, free=0.1 * GIB)


def trial(model, monkeypatch, fits, auto_chunk, passages=3, passage_tokens=10, queries=10**6):
    """What is tried, and what is found on a device where ``fits(tokens, held pieces, recomputed)``."""
    tried = []
    original = Objective.grad_cache

    def limited(self, model, batch, slices, *args, microbatches, num_retained, **kwargs):
        recomputed = recomputes_layers(model)
        tried.append((batch.num_tokens, len(slices), num_retained, recomputed))
        if not fits(*tried[-1]):
            raise torch.OutOfMemoryError("no")
        return original(
            self, model, batch, slices, *args, microbatches=microbatches, num_retained=num_retained, **kwargs
        )

    monkeypatch.setattr(Objective, "grad_cache", limited)
    terms = Objective([InfoNCE(), DPO(), KL()])
    return shrink_until_it_fits(model, terms, auto_chunk, passages, passage_tokens, nullcontext, queries), tried


def test_the_trial_gives_up_held_graphs_then_activations_then_halves_the_chunk(model, monkeypatch):
    found, tried = trial(model, monkeypatch, lambda tokens, *_: tokens <= 150, Chunking(400, 800, False))
    assert found == Chunking(100, 0, True)
    assert tried == [
        (1200, 3, 2, False),
        (800, 2, 1, False),
        (400, 1, 0, False),
        (400, 1, 0, True),
        (200, 1, 0, True),
        (80, 1, 0, True),
    ]
    assert all(p.grad is None for p in model.parameters())


def test_chunks_that_keep_a_device_busy_are_halved_before_layers_are_recomputed(model, monkeypatch):
    monkeypatch.setitem(auto_chunk._LEAST, "cpu", 100)
    found, tried = trial(model, monkeypatch, lambda tokens, *_: tokens <= 150, Chunking(400, 0, False))
    assert found == Chunking(100, 0, False)
    assert [(tokens, recomputed) for tokens, _, _, recomputed in tried] == [(400, False), (200, False), (80, False)]


def test_recomputed_layers_are_tried_with_the_first_chunk_again(model, monkeypatch):
    monkeypatch.setitem(auto_chunk._LEAST, "cpu", 100)
    found, tried = trial(model, monkeypatch, lambda *seen: seen[-1], Chunking(400, 0, False))
    assert found == Chunking(400, 0, True)
    assert [recomputed for *_, recomputed in tried] == [False, False, False, True]


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (1e6, Chunking(400, 0, False)),  # all that was planned
        (30_000, Chunking(280, 0, False)),  # 0.9 * 30,000 = 40 * 100 - 1,000 + 100 * 240
        (15_000, Chunking(400, 0, True)),  # below the least, so layers are recomputed
    ],
)
def test_a_split_llm_is_measured_and_its_neediest_rank_decides(model, monkeypatch, free, expected):
    """A step of n tokens takes 100 n - 1,000 bytes on this rank, 10 n with recomputed layers, and 4,000 for moments."""
    monkeypatch.setitem(auto_chunk._LEAST, "cpu", 200)
    monkeypatch.setattr(auto_chunk, "_local_bytes", lambda _: 0)
    asked = []

    def peak(step):
        step()
        gradients_there = any(p.grad is not None for p in model.parameters())
        assert gradients_there
        asked.append(40 * (1 + len(asked) % 2))
        return 10 * asked[-1] if recomputes_layers(model) else 100 * asked[-1] - 1000

    found = auto_chunk.fit_by_measurement(
        model, Objective([InfoNCE(), DPO()]), Chunking(400, 90, False), 3, 10, nullcontext, free, peak
    )
    assert found == expected
    assert all(p.grad is None for p in model.parameters())


def test_the_trial_runs_with_the_layers_recomputed_that_were_chosen(model, monkeypatch):
    _, tried = trial(model, monkeypatch, lambda *_: True, Chunking(400, 0, True))
    assert tried == [(400, 1, 0, True)]


def test_the_trial_has_no_more_queries_than_a_batch(model, monkeypatch):
    _, tried = trial(model, monkeypatch, lambda *_: True, Chunking(400, 10**6, False), queries=15)
    assert tried == [(600, 2, 2, False)]


def test_a_query_that_fits_nowhere_is_said(model, monkeypatch):
    with pytest.raises(ValueError, match=r"one query of 1000 tokens.*data\.passage_max_length"):
        trial(model, monkeypatch, lambda *_: False, Chunking(400, 0, False), passages=9, passage_tokens=100)


@pytest.mark.parametrize("held", [0, 70, 10**6])
def test_pieces_and_held_graphs_change_no_gradient(make_model, held):
    model = make_model("gpt2", lora_dropout=0.0).double().train()
    batch, loss = with_generation(make_batch()), GRL(chunk_tokens=40)
    slices, pieces = loss.chunks(batch), loss.microbatches(batch)
    assert len(pieces) != len(slices)
    loss.objective.full_batch(model, batch)
    expected = gradients(model)
    count = count_retained(batch, pieces, held)
    assert (count == 0) if held == 0 else (count == len(pieces)) if held > 1000 else (0 < count < len(pieces))
    loss.objective.grad_cache(model, batch, slices, microbatches=pieces, num_retained=count)
    assert_same_gradients(gradients(model), expected, 1e-10)


def test_a_checkpoint_brings_the_choice():
    loss, resumed = GradCache(), GradCache()
    assert loss.state_dict() == {}
    loss.chunking = Chunking(123, 45, False)
    resumed.load_state_dict(loss.state_dict())
    resumed.apply_chunking(resumed.chunking)
    assert (resumed.chunk_tokens, resumed.retained_tokens) == (123, 45)
    explicit = GradCache(chunk_tokens=77)
    explicit.apply_chunking(Chunking(123, 45, False))
    assert (explicit.chunk_tokens, explicit.retained_tokens) == (77, 0)
