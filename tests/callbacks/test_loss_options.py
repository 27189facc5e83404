"""Options under ``loss:`` and ``model.optimizer`` that are out of range, from Python, where no CLI checks their types."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_gradcache import make_batch
from test_objective import with_generation

from ullme.callbacks import GRL, GradCache
from ullme.losses import SFT, InfoNCE
from ullme.training.module import OptimizerConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRL(generation_weight=-0.5), r"GRL\.generation_weight=-0\.5: must be 0 or more"),
        (lambda: GRL(kl_weight=float("nan")), r"GRL\.kl_weight=nan"),
        (lambda: GRL(contrastive_weight=-1), r"GRL\.contrastive_weight=-1: must be 0 or more"),
        (lambda: GRL(contrastive_weight=0, generation_weight=0, kl_weight=0), "are all 0; give one of them"),
        (lambda: GradCache(on_oom="halve"), r"loss\.on_oom='halve': choose fail or halve_chunk"),
        (lambda: GradCache(reference="frozen"), r"loss\.reference='frozen'"),
        (lambda: OptimizerConfig(schedule="step"), r"model\.optimizer\.schedule=step .*linear, cosine, constant"),
        (lambda: OptimizerConfig(betas=(0.9,)), r"model\.optimizer\.betas"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_weight_of_zero_leaves_the_term_out():
    assert [term.name for term in GRL(generation_weight=0, kl_weight=0).objective.terms] == ["info_nce"]
    assert [term.name for term in GRL(contrastive_weight=0, generation_weight=0).objective.terms] == ["kl"]


def test_a_batch_without_generation_terms_fits_whole_into_its_own_tokens():
    batch = with_generation(make_batch())
    loss = GradCache([InfoNCE(), SFT()], chunk_tokens=batch.num_tokens)
    assert not loss._fits(batch)  # with generation, two graphs of that size
    assert loss._fits(replace(batch, terms=("info_nce",)))
