"""A teacher at chance is said before the first step, and one that ranks well after few rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_gradcache import make_batch
from test_objective import with_generation

from ullme.batch import Batch
from ullme.engine.objective import Objective
from ullme.engine.reference import Cached, Reference
from ullme.engine.teacher_quality import TeacherQuality, measure_teacher
from ullme.losses import KL, InfoNCE


class Given(Reference):
    """Likelihoods that are known beforehand: the positive of the first ``right`` of ten rows is the best."""

    def __init__(self, right: int) -> None:
        self.right, self.asked = right, 0

    def prepare(self, *args) -> None: ...

    def logps(self, model, batch, mask, *args):
        self.asked += len(batch)
        scores = torch.arange(mask.shape[1], dtype=torch.float).repeat(len(batch), 1)
        scores[batch.row_ids % 10 < self.right, 0] = 99.0
        return scores - 200


@pytest.fixture
def batch() -> Batch:
    batch = with_generation(make_batch(40, 5))
    return replace(batch, row_ids=torch.arange(40))


def measured(right: int, batches: list[Batch], model) -> tuple[TeacherQuality | None, int]:
    reference = Given(right)
    objective = Objective([InfoNCE(), KL("query_given_passage", teacher="reference")], reference)
    return measure_teacher(objective, model, batches), reference.asked


def test_by_hand(make_model, batch):
    """Five candidates. A wrong row's positive is the worst: rank five."""
    found, asked = measured(3, [batch] * 4, make_model())
    assert found is not None
    assert (found.accuracy, found.candidates, found.rows, asked) == (pytest.approx(0.3), 5, 100, 100)
    assert found.mrr == pytest.approx(0.3 + 0.7 / 5)
    assert found.deviations == pytest.approx(0.1 / math.sqrt(0.2 * 0.8 / 100))
    assert not found.at_chance
    assert "ranks 30 % of 100 positives first among 5 candidates (chance 20 %), MRR 0.44" in str(found)


def test_a_good_teacher_is_known_after_few_rows_and_one_at_chance_is_told(make_model, batch):
    good, asked = measured(10, [batch] * 4, make_model())
    assert good is not None
    assert (good.accuracy, good.mrr, asked) == (1, 1, 20)
    poor, asked = measured(2, [batch] * 4, make_model())
    assert poor is not None
    assert poor.at_chance
    assert asked == 100
    assert "kl_weight" in poor.remedy
    assert "direction=query_given_passage" in replace(poor, direction="passage_given_query").remedy


def test_a_cache_that_ends_before_the_hundredth_row_stops_no_training(make_model, batch, tmp_path):
    """Training may end before it too. What is held is measured."""
    model = make_model()
    Objective([KL(teacher="reference")], filling := Cached(tmp_path, Given(0))).check_model(model)
    everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)
    filling.logps(model, batch[:20], everything[:20], True)
    objective = Objective([KL(teacher="reference")], Cached(tmp_path, None))
    objective.check_model(model)
    found = measure_teacher(objective, model, [batch])
    assert found is not None
    assert found.rows == 20
    assert measure_teacher(objective, model, [batch[20:]]) is None


def test_where_there_is_nothing_to_measure(make_model, batch):
    model = make_model()
    assert measured(3, [replace(batch, labelled=False)], model)[0] is None
    assert measure_teacher(Objective([InfoNCE()]), model, [batch]) is None


def test_the_policy_teacher_is_scored_in_evaluation_mode(make_model, batch):
    """And the model is left in the mode it was in."""
    model = make_model(lora_dropout=0.5).train()
    state = torch.get_rng_state()
    first, second = (measure_teacher(Objective([KL()]), model, [batch]) for _ in range(2))
    assert first == second is not None
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_only_rows_of_as_many_candidates_are_measured_together(make_model, batch):
    """Chance is another one among three candidates than among five."""
    three = with_generation(make_batch(40, 3))
    found, asked = measured(3, [batch, three, three], make_model())
    assert found is not None
    assert (found.candidates, found.rows, asked) == (5, 40, 40)


def test_a_rank_with_more_rows_than_another_measures_as_many(make_model, batch, monkeypatch):
    """Else it would wait for a likelihood that no other rank computes, for ever."""
    monkeypatch.setattr("ullme.engine.teacher_quality.all_reduce_max", lambda value, device: max(value, -21))
    found, asked = measured(3, [batch], make_model())
    assert found is not None
    assert (found.rows, asked) == (21, 21)
