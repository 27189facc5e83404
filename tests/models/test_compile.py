"""torch.compile changes the speed and nothing else, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
from test_gradcache import assert_same_gradients, gradients, make_batch
from test_objective import with_generation

from ullme.engine.gradcache import GradCache, chunk_slices
from ullme.engine.objective import Objective
from ullme.engine.scoring import embedder
from ullme.losses import DPO, KL, InfoNCE

pytestmark = pytest.mark.slow  # a minute of compilation


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_same_gradients_and_no_new_graphs_for_new_lengths(make_model):
    plain, compiled = make_model().train(), make_model(compile=True).train()
    compiled.load_state_dict(plain.state_dict())
    objective = Objective([InfoNCE(), DPO(weight=0.5), KL()])
    seen = []
    for queries in (5, 3, 4, 7):
        batch = with_generation(make_batch(queries))
        found = []
        for model in (plain, compiled):
            logs = objective.grad_cache(model, batch, chunk_slices(batch, 2, None))
            found.append((logs["loss"].item(), gradients(model)))
        seen.append(graphs())
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        assert_same_gradients(found[1][1], found[0][1], 1e-5)
    assert seen[0] > 0
    assert seen[2] == seen[3], "lengths must not compile anew"


def test_dropout_is_replayed(make_model):
    """The forward without gradient and the one with it are compiled apart, and must draw the same numbers."""
    model = make_model(compile=True, lora_dropout=0.3).train()
    batch, seen = make_batch(), []

    def embed(rows):
        seen.append(embedder(model)(rows))
        return seen[-1]

    GradCache(embed, InfoNCE()).step(batch, chunk_slices(batch, 2, None))
    assert graphs() > 0
    for a, b in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert (embedder(model)(batch.queries) - seen[0][: len(batch.queries)][:1]).abs().max() > 1e-3
