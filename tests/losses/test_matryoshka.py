"""Matryoshka by hand, against the wrapped term on truncated embeddings (tests/test_peers.py: against sentence-transformers)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from ullme.batch import Representations
from ullme.engine.objective import Objective
from ullme.losses import KL, InfoNCE, Matryoshka, PseudoLabelInfoNCE, RepresentationLoss
from ullme.training.negatives import check_negatives


def random_reps(b: int = 4, c: int = 3, d: int = 6) -> Representations:
    generator = torch.Generator().manual_seed(0)
    queries, passages = (
        torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.double, generator=generator), dim=-1)
        for shape in ((b, d), (b, c, d))
    )
    return Representations(queries, passages, torch.arange(b * c).view(b, c))


def test_by_hand():
    """One query (0.6, 0.8, 0), a positive (0.6, 0, 0.8) and a negative (0, 1, 0), τ = 1.

    Whole: cosines 0.36 and 0.8. Two dimensions: (0.6, 0.8) against (1, 0) and (0, 1), so 0.6 and 0.8. One dimension:
    1 against 1 and 0, since a vector of zeros stays one.
    """
    queries = torch.tensor([[0.6, 0.8, 0]], dtype=torch.double)
    passages = torch.tensor([[[0.6, 0, 0.8], [0, 1, 0]]], dtype=torch.double)
    reps = Representations(queries, passages, torch.tensor([[1, 2]]))

    def nll(positive: float, negative: float) -> float:
        return -positive + math.log(math.exp(positive) + math.exp(negative))

    parts = nll(0.36, 0.8), nll(0.6, 0.8), nll(1, 0)
    assert len({round(part, 6) for part in parts}) == 3
    loss = Matryoshka(InfoNCE(1.0), [2, 1], [0.5, 3.0])
    assert loss(reps).item() == pytest.approx(parts[0] + 0.5 * parts[1] + 3 * parts[2], abs=1e-12)
    assert Matryoshka(InfoNCE(1.0), [2, 1])(reps).item() == pytest.approx(sum(parts), abs=1e-12)
    found = {name: value.item() for name, value in loss.metrics(reps).items()}
    expected = dict(zip(["info_nce_3", "info_nce_2", "info_nce_1"], parts, strict=True))
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_gradient_reaches_what_each_width_sees():
    """With the weight of the smallest width alone, no later dimension has a gradient but that of the full width."""
    reps = random_reps()
    grads = []
    for loss in (InfoNCE(0.1), Matryoshka(InfoNCE(0.1), [2])):
        queries = reps.queries.clone().requires_grad_()
        loss(Representations(queries, reps.passages, reps.passage_keys)).backward()
        grads.append(queries.grad)
    difference = (grads[1] - grads[0]).abs()
    assert difference[:, :2].max() > 1e-2
    assert difference[:, 2:].max() == 0


def test_gradient():
    reps = random_reps(2, 2, 4)
    loss = Matryoshka(InfoNCE(0.3, bidirectional=True), [3, 1], [0.5, 2.0])
    assert torch.autograd.gradcheck(
        lambda q, p: loss(Representations(q, p, reps.passage_keys)),
        (reps.queries.requires_grad_(), reps.passages.requires_grad_()),
    )


def test_half_precision_is_computed_in_float32():
    reps = random_reps(8, 3, 16)
    half = Representations(reps.queries.bfloat16(), reps.passages.bfloat16(), reps.passage_keys)
    rounded = Representations(half.queries.double(), half.passages.double(), reps.passage_keys)
    exact = Matryoshka(InfoNCE(0.05), [8, 4])(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        loss = Matryoshka(InfoNCE(0.05), [8, 4])(half)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_it_wraps_any_representation_term():
    """What the term itself needs reaches it: a teacher, keys, whether positives are known."""

    class Mean(RepresentationLoss):
        name = "mean"
        needs_positive = False
        columns = ("score",)

        def forward(self, reps):
            assert reps.labelled is False
            return (reps.queries[:, None] * reps.passages).sum(-1).mean() * reps.teacher.mean()

    reps = random_reps()
    reps = Representations(reps.queries, reps.passages, reps.passage_keys, None, False, torch.full((4, 3), 2.0))
    loss = Matryoshka(Mean(), [3])
    cut = [torch.nn.functional.normalize(part[..., :3], dim=-1) for part in (reps.queries, reps.passages)]
    expected = sum(2 * (q[:, None] * p).sum(-1).mean() for q, p in ((reps.queries, reps.passages), cut))
    assert loss(reps).item() == pytest.approx(expected.item(), abs=1e-12)
    assert (loss.name, loss.needs_positive, loss.columns) == ("matryoshka_mean", False, ("score",))
    pseudo = Matryoshka(PseudoLabelInfoNCE(), [3])
    assert (pseudo.needs_positive, pseudo.teacher_direction) == (False, "query_given_passage")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": [8, 16]}, r"Matryoshka.dims=\[8, 16\]: give each once, the largest first: \[16, 8\]"),
        ({"dims": [8, 8]}, r"dims=\[8, 8\]: give each once, the largest first: \[8\]"),
        ({"dims": []}, r"dims=\[\]: give at least one"),
        ({"dims": [8, 0]}, r"dims=\[8, 0\]: give at least one number of dimensions, each at least 1"),
        ({"weights": [1.0]}, r"weights=\[1.0\]: give a number of 0 or more for each of dims=\[16, 8\]"),
        ({"weights": [1.0, -1.0]}, r"weights=\[1.0, -1.0\]"),
        ({"weights": [1.0, float("nan")]}, r"weights=\[1.0, nan\]"),
        ({"weight": -1.0}, "Matryoshka.weight=-1"),
        ({"term": KL()}, "Matryoshka.term=KL: embeddings are truncated for a representation loss only"),
        ({"term": Matryoshka(InfoNCE(), [2])}, "Matryoshka.term=Matryoshka"),
        ({"term": InfoNCE(weight=0.5)}, "InfoNCE.weight=0.5 would have no effect; set Matryoshka.weight"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Matryoshka(**{"term": InfoNCE(), "dims": [16, 8], **options})


@pytest.mark.parametrize("dims", [[32, 8], [64]])
def test_dims_that_are_not_below_the_hidden_size_are_refused_before_training(dims):
    model = SimpleNamespace(hidden_size=32)
    with pytest.raises(ValueError, match=rf"{dims[0]} is not below the hidden size of the LLM, 32"):
        Objective([Matryoshka(InfoNCE(), dims)]).check(model, 1)
    objective = Objective([Matryoshka(InfoNCE(), [16, 8])])
    objective.check(model, 1)
    assert objective.matryoshka_dims == (16, 8)
    assert Objective([InfoNCE()]).matryoshka_dims == ()


def test_a_wrapped_loss_without_negatives_is_refused():
    with pytest.raises(ValueError, match="there is no negative"):
        check_negatives([Matryoshka(InfoNCE(), [2])], batch_size=1, num_hard_negatives=0)
