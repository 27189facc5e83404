"""CoSENT and cosine regression against values worked out by hand, and against sentence-transformers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_info_nce import random_reps

from ullme.losses import CoSENT, CosineRegression
from ullme.losses.scored_pairs import cosent, cosine_regression

NAN = math.nan


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


def test_cosent_by_hand():
    """Scores 3 > 1 = 1: the pairs (0, 1) and (0, 2), with (cos_j − cos_0) / 0.5 = −0.6 and 0.4."""
    found = cosent(tensor(0.5, 0.2, 0.7), tensor(3.0, 1.0, 1.0), 0.5)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-0.6) + math.exp(0.4)), abs=1e-12)
    assert cosent(tensor(0.5, 0.2), tensor(2.0, 2.0)).item() == 0  # nothing is ordered
    with_nan = cosent(tensor(0.5, 0.9, 0.2, 0.7), tensor(3.0, NAN, 1.0, 1.0), 0.5)
    assert with_nan.item() == pytest.approx(found.item(), abs=1e-12)


def test_regression_by_hand():
    found = cosine_regression(tensor(0.5, 0.2, 0.9), tensor(1.0, 0.0, NAN))
    torch.testing.assert_close(found, tensor(0.25, 0.04, 0.0))


def scored(b: int = 5):
    column = tensor(0.9, 0.1, 0.4, 0.4, 0.7)
    return replace(random_reps(b, 1, 6), columns={"score": column[:b]})


def test_the_modules_use_the_cosine_with_the_first_candidate_and_the_range_of_the_scores():
    reps = scored()
    cosines = (reps.queries * reps.passages[:, 0]).sum(1)
    torch.testing.assert_close(CoSENT(0.1)(reps), cosent(cosines, reps.columns["score"], 0.1))
    column = reps.columns["score"].clone()
    column[1] = NAN
    partly = replace(reps, columns={"score": column * 5})
    expected = cosine_regression(cosines, column).sum() / 4
    torch.testing.assert_close(CosineRegression(highest=5.0)(partly), expected)
    with pytest.raises(ValueError, match=r"score 4.5 is outside of lowest=0 and highest=1"):
        CosineRegression()(partly)


@pytest.mark.parametrize("loss", [CoSENT(0.2), CosineRegression()])
def test_gradient(loss):
    reps = scored()
    inputs = reps.queries.clone().requires_grad_(), reps.passages.clone().requires_grad_()
    loss(replace(reps, queries=inputs[0], passages=inputs[1])).backward()
    assert inputs[0].grad.abs().max() > 1e-3
    assert torch.autograd.gradcheck(lambda q, p: loss(replace(reps, queries=q, passages=p)), inputs)


def test_equal_to_sentence_transformers():
    reason = "sentence-transformers is not installed"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    losses = pytest.importorskip("sentence_transformers.losses", reason=reason)
    reps = scored().as_leaves()
    peers = [x.detach().clone().requires_grad_() for x in (reps.queries, reps.passages)]
    labels = reps.columns["score"]
    found = CoSENT(0.05)(reps)
    # of unit vectors; its default normalises once more, and then the gradient has no part along the vector
    dot = sentence_transformers.util.pairwise_dot_score
    expected = losses.CoSENTLoss(torch.nn.Identity(), 20.0, similarity_fct=dot).compute_loss_from_embeddings(
        [peers[0], peers[1][:, 0]], labels
    )
    assert expected.item() > 0.5
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    found.backward()
    expected.backward()
    assert peers[0].grad.abs().max() > 1e-2
    torch.testing.assert_close(reps.queries.grad, peers[0].grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(reps.passages.grad, peers[1].grad, rtol=1e-6, atol=1e-9)


def test_options_and_columns_that_do_not_fit():
    with pytest.raises(ValueError, match=r"CoSENT\.temperature=0: must be above 0"):
        CoSENT(0)
    with pytest.raises(ValueError, match=r"highest=1\.0 must be above lowest=1\.0"):
        CosineRegression(lowest=1.0)
    reps = replace(random_reps(2, 3, 4), columns={"score": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"CoSENT\.column='score' has one number a candidate.*take DistillationKL"):
        CoSENT()(reps)
