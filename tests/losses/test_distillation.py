"""Distillation against values worked out by hand, and against sentence-transformers' losses on the same embeddings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_info_nce import random_reps

from ullme.losses import DistillationKL, MarginMSE
from ullme.losses.distillation import distillation_kl, margin_mse

NAN = math.nan


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


def test_kl_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2) at T = 2: 4 · (3/4 ln 3/2 + 1/4 ln 1/2)."""
    teacher = tensor([2 * math.log(3), 0.0])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    torch.testing.assert_close(distillation_kl(tensor([7.0, 7.0]), teacher, 2.0), tensor(expected))
    torch.testing.assert_close(distillation_kl(teacher, teacher, 2.0), tensor(0.0))


def test_a_missing_score_leaves_its_candidate_out_of_both_distributions():
    teacher = tensor([math.log(3), NAN, 0.0], [1.0, NAN, NAN], [NAN, NAN, NAN])
    student = tensor([7.0, 90.0, 7.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).requires_grad_()
    found = distillation_kl(student, teacher)
    torch.testing.assert_close(found, tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0, 0.0))
    found.sum().backward()
    torch.testing.assert_close(student.grad[0], tensor(0.5 - 0.75, 0.0, 0.5 - 0.25))  # P_s − P_t
    assert not student.grad[1:].any()


def test_margin_mse_by_hand():
    """Student margins 3 and 1, teacher's 1 and 5 (and one missing): 4 + 16 over two."""
    sums, counts = margin_mse(tensor([5.0, 2.0, 4.0, 9.0]), tensor([1.0, 5.0, NAN]))
    torch.testing.assert_close(sums, tensor(20.0))
    assert counts.tolist() == [2]


def scored(scores: torch.Tensor | None = None):
    reps = random_reps(4, 3, 6)
    generator = torch.Generator().manual_seed(2)
    column = torch.randn(4, 3, dtype=torch.double, generator=generator) if scores is None else scores
    return replace(reps, columns={"score": column})


def test_the_mean_is_over_queries_with_scores():
    reps = scored()
    column = reps.columns["score"].clone()
    column[2], column[3, :2] = NAN, NAN
    found = DistillationKL(temperature=0.5)(replace(reps, columns={"score": column}))
    parts = [
        DistillationKL(temperature=0.5)(replace(reps[n : n + 1], columns={"score": column[n : n + 1]}))
        for n in range(4)
    ]
    assert parts[2] == parts[3] == 0
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)
    margins = MarginMSE()(replace(reps, columns={"score": column}))
    cosines = torch.einsum("bd,bcd->bc", reps.queries, reps.passages)[:2]
    errors = (cosines[:, :1] - cosines[:, 1:]) - (column[:2, :1] - column[:2, 1:])
    torch.testing.assert_close(margins, errors.square().mean())
    nothing = replace(reps, columns={"score": torch.full_like(column, NAN)})
    assert DistillationKL()(nothing) == MarginMSE()(nothing) == 0


def test_a_margin_of_the_query():
    reps = replace(random_reps(2, 2, 4), columns={"score": torch.tensor([0.5, NAN])})
    difference = (reps.queries[0] * (reps.passages[0, 0] - reps.passages[0, 1])).sum() * 3
    torch.testing.assert_close(MarginMSE(scale=3.0)(reps), (difference - 0.5).square())
    with pytest.raises(ValueError, match=r"DistillationKL.column='score' has one number a query"):
        DistillationKL()(reps)
    with pytest.raises(ValueError, match=r"MarginMSE.column='score' has one number a query"):
        MarginMSE()(replace(random_reps(2, 3, 4), columns=reps.columns))


@pytest.mark.parametrize("loss", [DistillationKL(temperature=0.3), MarginMSE(scale=2.0)])
def test_gradient(loss):
    reps = scored()
    reps.columns["score"][1, 2] = NAN
    inputs = reps.queries.clone().requires_grad_(), reps.passages.clone().requires_grad_()
    loss(replace(reps, queries=inputs[0], passages=inputs[1])).backward()
    assert inputs[0].grad.abs().max() > 1e-3
    assert torch.autograd.gradcheck(lambda q, p: loss(replace(reps, queries=q, passages=p)), inputs)


@pytest.mark.parametrize("name", ["DistillKLDivLoss", "MarginMSELoss"])
@pytest.mark.parametrize("candidates", [2, 4])
def test_equal_to_sentence_transformers(name, candidates):
    losses = pytest.importorskip("sentence_transformers.losses", reason="sentence-transformers is not installed")

    class Given(torch.nn.Module):
        """A model whose features are its embeddings."""

        def forward(self, features):
            return {"sentence_embedding": features["x"]}

    reps = random_reps(5, candidates, 6)
    labels = torch.randn(5, candidates, dtype=torch.double, generator=torch.Generator().manual_seed(7))
    kl = name == "DistillKLDivLoss"
    ours = DistillationKL(temperature=0.7, teacher_temperature=1.5) if kl else MarginMSE()
    options = {"student_temperature": 0.7, "teacher_temperature": 1.5} if kl else {}
    mine, theirs = reps.as_leaves(), reps.as_leaves()
    found = ours(replace(mine, columns={"score": labels}))
    features = [{"x": theirs.queries}, *({"x": theirs.passages[:, c]} for c in range(candidates))]
    expected = getattr(losses, name)(Given(), **options)(features, labels)
    assert expected.item() > 1e-3
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    for one, other in ((mine.queries.grad, theirs.queries.grad), (mine.passages.grad, theirs.passages.grad)):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistillationKL(temperature=0), r"DistillationKL\.temperature=0: must be above 0"),
        (lambda: DistillationKL(teacher_temperature=-1), r"DistillationKL\.teacher_temperature=-1: must be above 0"),
        (lambda: MarginMSE(scale=0), r"MarginMSE\.scale=0: must be above 0"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


BM25 = [{"score": (24.0, 11.0, 8.5, NAN)}] * 9 + [{"score": (12.0, 12.0, 12.0, NAN)}]
COSINES = [{"score": (0.8, 0.6, 0.75, NAN)}] * 10


def test_a_teacher_in_another_unit_is_doubted():
    """Nine of ten rows are no more than nine tenths; a teacher_temperature of the scores' own spread is fine."""
    doubt = DistillationKL(teacher_temperature=0.05).doubt([*BM25[:9], *BM25[:9], BM25[9]])
    assert doubt.startswith(
        "DistillationKL.teacher_temperature=0.05: for 18 of 19 rows the teacher gives more than 99%"
    )
    assert "standard deviation of 8.3: try a teacher_temperature of about that" in doubt  # of 24, 11 and 8.5
    assert DistillationKL(temperature=0.05).doubt(BM25[:9]).startswith("DistillationKL.temperature=0.05: for 9 of 9")
    for loss, rows in (
        (DistillationKL(teacher_temperature=0.05), BM25),
        (DistillationKL(teacher_temperature=8.3), BM25[:9]),
        (DistillationKL(temperature=0.05), COSINES),
        (DistillationKL(temperature=0.05), [{}, {"score": 3.0}, {"score": (40.0, NAN)}]),
    ):
        assert loss.doubt(rows) is None


def test_margins_that_no_cosines_have_are_doubted():
    doubt = MarginMSE().doubt(BM25)  # 9 times 13 and 15.5, and 0 twice
    assert doubt.startswith("MarginMSE.scale=1: 18 of 20 of the teacher's margins are beyond 2")
    assert "their median is 13: try a scale" in doubt
    assert MarginMSE().doubt([{"score": 3.0}, {"score": NAN}]) is not None
    for loss, rows in ((MarginMSE(scale=14.0), BM25), (MarginMSE(), COSINES), (MarginMSE(), [{}, {"score": NAN}])):
        assert loss.doubt(rows) is None
