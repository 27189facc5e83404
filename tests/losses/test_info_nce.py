"""InfoNCE against values worked out by hand and against its definition written as loops."""

from __future__ import annotations

import math

import pytest
import torch

from ullme.batch import Representations
from ullme.losses import InfoNCE, info_nce


def unit(*angles: float) -> torch.Tensor:
    """Points of the unit circle, so that a cosine is the cosine of a difference."""
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.double)


def random_reps(b: int = 4, c: int = 3, d: int = 6, keys: torch.Tensor | None = None) -> Representations:
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(b, d, dtype=torch.double, generator=generator), dim=-1)
    passages = torch.nn.functional.normalize(torch.randn(b, c, d, dtype=torch.double, generator=generator), dim=-1)
    return Representations(queries, passages, torch.arange(b * c).view(b, c) if keys is None else keys)


def test_by_hand():
    """cos 60° against cos 90° and cos 180°, τ = 0.5: −1 + ln(e + 1 + e^−2)."""
    loss = info_nce(unit(0), unit(math.pi / 3, math.pi / 2, math.pi), torch.tensor([0]), None, 0.5)
    assert loss.item() == pytest.approx(-1 + math.log(math.e + 1 + math.exp(-2)), abs=1e-12)


def by_loops(reps: Representations, tau: float, in_batch: bool, mask: bool, both_ways: bool) -> float:
    b, c, _ = reps.passages.shape
    forward, backward = [], []
    for i in range(b):
        positive = math.exp(reps.queries[i] @ reps.passages[i, 0] / tau)
        total = positive
        for j in range(b):
            for k in range(c):
                duplicate = bool(reps.passage_keys[j, k] == reps.passage_keys[i, 0])
                if (j, k) == (i, 0) or (mask and duplicate) or (not in_batch and j != i):
                    continue
                total += math.exp(reps.queries[i] @ reps.passages[j, k] / tau)
        forward.append(-math.log(positive / total))
        total = positive
        for j in range(b):
            if j != i and not (mask and reps.passage_keys[j, 0] == reps.passage_keys[i, 0]):
                total += math.exp(reps.queries[j] @ reps.passages[i, 0] / tau)
        backward.append(-math.log(positive / total))
    mean = sum(forward) / b
    return (mean + sum(backward) / b) / 2 if both_ways else mean


@pytest.mark.parametrize(
    ("in_batch", "mask", "both_ways"),
    [(True, False, False), (False, False, False), (True, True, False), (False, True, False), (True, True, True)],
)
def test_against_loops(in_batch, mask, both_ways):
    keys = torch.arange(12).view(4, 3)
    keys[2, 0] = keys[0, 0]  # two queries share their positive
    keys[3, 2] = keys[1, 0]  # and one's positive is another's hard negative
    keys[1, 1] = keys[1, 0]  # and one is its own hard negative
    reps = random_reps(keys=keys)
    loss = InfoNCE(0.1, in_batch, mask, both_ways)(reps)
    assert loss.item() == pytest.approx(by_loops(reps, 0.1, in_batch, mask, both_ways), abs=1e-12)


def test_every_option_matters():
    keys = torch.arange(12).view(4, 3)
    keys[2, 0] = keys[0, 0]
    reps = random_reps(keys=keys)
    options = [(0.1, True, True, False), (0.1, False, True, False), (0.1, True, False, False), (0.1, True, True, True)]
    values = [InfoNCE(*o)(reps).item() for o in [*options, (0.2, True, True, False)]]
    assert len({round(v, 6) for v in values}) == 5


def test_hand_written_in_batch_example_of_the_shared_positive():
    """Two rows with one text as positive: without the mask each would push its own positive away."""
    reps = Representations(unit(0, 0), unit(0, 0)[:, None], torch.tensor([[7], [7]]))
    assert InfoNCE(1.0)(reps).item() == pytest.approx(0, abs=1e-12)
    assert InfoNCE(1.0, mask_duplicates=False)(reps).item() == pytest.approx(math.log(2), abs=1e-12)


def test_order_of_queries_does_not_matter():
    reps = random_reps()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Representations(reps.queries[order], reps.passages[order], reps.passage_keys[order])
    assert InfoNCE()(reps).item() == pytest.approx(InfoNCE()(shuffled).item(), abs=1e-12)
    wrong = Representations(reps.queries[order], reps.passages, reps.passage_keys)
    assert InfoNCE()(wrong).item() != pytest.approx(InfoNCE()(reps).item(), abs=1e-3)


@pytest.mark.parametrize("both_ways", [False, True])
def test_gradient(both_ways):
    reps = random_reps(3, 2, 4)
    loss = InfoNCE(0.3, bidirectional=both_ways)
    assert torch.autograd.gradcheck(
        lambda q, p: loss(Representations(q, p, reps.passage_keys)),
        (reps.queries.requires_grad_(), reps.passages.requires_grad_()),
    )


def test_half_precision_under_autocast_is_float32():
    reps = random_reps(8, 3, 16)
    exact = InfoNCE(0.02)(reps)
    half = Representations(reps.queries.float(), reps.passages.float(), reps.passage_keys)
    with torch.autocast("cpu", torch.bfloat16):
        loss = InfoNCE(0.02)(half)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0: must be above 0"),
        ({"weight": -1}, "InfoNCE.weight=-1"),
        ({"bidirectional": True, "in_batch_negatives": False}, "bidirectional=true needs in_batch_negatives"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(**options)
