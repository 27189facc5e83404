"""The paper's second listing, as printed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import on_ranks
from test_training import write_rows

from ullme.data.datamodule import ULLMEDataModule
from ullme.distributed import world
from ullme.models import ULLME
from ullme.trainer import GradCacheTrainer


@pytest.fixture
def loader(tmp_path):
    train, _ = write_rows(tmp_path)

    def make(model, generation: bool = True):
        data = ULLMEDataModule(train=train, batch_size=6, num_hard_negatives=3, num_workers=0, query_max_length=100)
        return data.train_dataloader_for(model.prompt_tokenizer, generation=generation)

    return make


@pytest.mark.parametrize("gen_loss_type", ["sft", "dpo", "kto", "cpo", None])
@pytest.mark.parametrize("use_kl_loss", [True, False])
def test_listing_2_runs_as_printed(gen_loss_type, use_kl_loss, make_model, loader):
    model = make_model()
    train_data_loader = loader(model)
    assert isinstance(train_data_loader, torch.utils.data.DataLoader)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = GradCacheTrainer(con_loss_type="NTXentLoss", gen_loss_type=gen_loss_type, use_kl_loss=use_kl_loss)
    history = trainer.fit_epoch(model=model, train_loader=train_data_loader)
    assert len(history) == 4
    wanted = {"loss", "info_nce", *([gen_loss_type] if gen_loss_type else []), *(["kl"] if use_kl_loss else [])}
    assert wanted <= history[0].keys()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training, make_model, loader):
    model = make_model(lora_dropout=0.5).train(training)
    batches = list(loader(model))
    modes = []
    model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    trainer = GradCacheTrainer(show_progress_bar=False)
    trainer.fit_epoch(model, batches)
    assert all(modes)  # trained with dropout
    assert {module.training for module in model.modules()} == {training}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(ValueError, match="info_nce is nan"):
        trainer.fit_epoch(model, batches)
    assert model.training == training


def test_batches_without_any_negative_are_refused(make_model, tmp_path):
    model = make_model()
    data = ULLMEDataModule(
        train=write_rows(tmp_path)[0], batch_size=1, num_hard_negatives=0, num_workers=0, query_max_length=100
    )
    batches = data.train_dataloader_for(model.prompt_tokenizer)
    with pytest.raises(ValueError, match=r"num_hard_negatives=0 and data\.batch_size=1 there is no negative"):
        GradCacheTrainer(show_progress_bar=False).fit_epoch(model, batches)


def test_grl_learns_every_term(make_model, loader):
    model = make_model()
    trainer = GradCacheTrainer(
        con_loss_type="NTXentLoss", gen_loss_type="dpo", use_kl_loss=True, lr=0.01, show_progress_bar=False
    )
    data = loader(model)
    history = [step for _ in range(6) for step in trainer.fit_epoch(model=model, train_loader=data)]
    for name in ("loss", "info_nce", "dpo"):
        first, last = (np.mean([step[name] for step in part]) for part in (history[:4], history[-4:]))
        assert last < first, name
    assert np.mean([s["reward_accuracy"] for s in history[-4:]]) > 0.7


def test_prompts_and_passages_beyond_the_positions_are_refused(make_model, loader):
    """GPT-2 has a table of positions; the query fits by itself, and with its passage it does not."""
    model = make_model("gpt2", sizes={"max_position_embeddings": 40})
    trainer = GradCacheTrainer(gen_loss_type="sft", show_progress_bar=False)
    batches = list(loader(model))
    with pytest.raises(ValueError, match=r"tokens, but .* has 40 positions; cut texts at fewer tokens"):
        trainer.fit_epoch(model=model, train_loader=batches)
    assert trainer.steps == 0


def test_batches_of_the_wrong_kind_and_wrong_options(make_model, loader):
    model = make_model()
    trainer = GradCacheTrainer(gen_loss_type="dpo", show_progress_bar=False)
    with pytest.raises(ValueError, match="generation=True"):
        trainer.fit_epoch(model=model, train_loader=loader(model, generation=False))
    for options, message in (
        ({"con_loss_type": "Triplet"}, "con_loss_type='Triplet'"),
        ({"gen_loss_type": "ppo"}, "generation='ppo': choose one of dpo, sft, kto, cpo"),
        ({"precision": "16"}, "precision='16'"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            GradCacheTrainer(**options)


def test_another_model_is_trained_too(make_model, loader):
    trainer = GradCacheTrainer(show_progress_bar=False)
    for _ in range(2):
        model = make_model()
        before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer.fit_epoch(model=model, train_loader=loader(model))
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_full_fine_tuning_with_a_frozen_copy(make_model, loader):
    model = make_model(lora_name=None)
    trainer = GradCacheTrainer(gen_loss_type="dpo", reference="frozen_copy", show_progress_bar=False)
    history = trainer.fit_epoch(model=model, train_loader=loader(model))
    assert history[0]["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert history[-1]["dpo"] != pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_stops_before_any_weight_moves(clip, make_model, loader):
    model = make_model()
    trainer = GradCacheTrainer(gradient_clip_val=clip, show_progress_bar=False)
    first = trainer.fit_epoch(model=model, train_loader=loader(model))
    assert all(step["grad_norm"] > 0 and step["tokens/s"] > 0 for step in first)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("inf"))  # the loss itself stays finite
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"step 4: the gradient norm is (nan|inf) \(training rows \["):
        trainer.fit_epoch(model=model, train_loader=loader(model))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def _share(folder: str, train: str) -> tuple[list[dict], dict]:
    rank, ranks = world()
    torch.manual_seed(rank)  # as processes do that set no seed: each draws another adapter
    model = ULLME(folder, lora_r=4, lora_dropout=0.0)
    drawn = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    data = ULLMEDataModule(train=train, batch_size=6, num_hard_negatives=3, num_workers=0, query_max_length=100)
    trainer = GradCacheTrainer(gen_loss_type="dpo", use_kl_loss=True, chunk_size=2, lr=0.01, show_progress_bar=False)
    data_loader = data.train_dataloader_for(model.prompt_tokenizer, rank, ranks, generation=True)
    history = trainer.fit_epoch(model=model, train_loader=data_loader)
    return history, drawn, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.distributed
def test_ranks_train_one_model(make_model, tmp_path):
    """Losses and weights are those of one process with the global batches."""
    train, _ = write_rows(tmp_path)
    folder = make_model().options.model_name_or_path
    (first, drawn, one), (second, other_drawn, two) = on_ranks(2, tmp_path / "ranks", _share, folder, train)
    assert any(not torch.equal(drawn[n], other_drawn[n]) for n in drawn)
    assert all(torch.equal(one[n], two[n]) for n in one)
    alone, _, weights = _share(folder, train)
    assert len(first) == len(alone) == 4
    for step, other, expected in zip(first, second, alone, strict=True):
        for name in ("loss", "info_nce", "dpo", "kl", "grad_norm", "reward_accuracy"):
            assert step[name] == other[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    assert abs(alone[0]["loss"] - alone[3]["loss"]) > 0.1
    for name, weight in weights.items():
        torch.testing.assert_close(one[name], weight, rtol=0, atol=2e-3)
