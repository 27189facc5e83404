"""What of the LLM is trained: an adapter, its biases, or everything."""

from __future__ import annotations

import pytest
import torch

from ullme.engine.fsdp import whole_parameters
from ullme.models.checkpoint import load_weights
from ullme.models.config import BackboneConfig
from ullme.models.trained_weights import contract, trainable_state


def test_biases_alone_are_trained_and_change_the_embedding(make_model):
    model = make_model("gpt2", lora_name=None, train="biases")
    trained = trainable_state(model)
    assert trained
    assert all(name.endswith(".bias") for name in trained)
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert set(trained) == every
    assert len(whole_parameters(model)) == len(every)
    ids = torch.arange(3, 9)[None]
    rep = model(ids)["rep"]
    (rep * torch.randn(rep.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved
    assert all(name.endswith(".bias") for name in moved)
    assert contract(model)["backbone"]["train"] == "biases"


def test_biases_are_a_checkpoint(make_model, tmp_path):
    from ullme.models.checkpoint import load_ullme
    from ullme.models.trained_weights import CONTRACT_KEY, STATE_PREFIX

    model = make_model("gpt2", lora_name=None, train="biases").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    state = {STATE_PREFIX + name: value for name, value in trainable_state(model).items()}
    torch.save({CONTRACT_KEY: contract(model), "state_dict": state}, tmp_path / "run.ckpt")
    again = load_ullme(tmp_path / "run.ckpt")
    texts = ["the mill", "a market"]
    assert (again.encode(texts) == model.encode(texts)).all()
    assert abs(make_model("gpt2", lora_name=None).encode(texts) - model.encode(texts)).max() > 1e-3
    with pytest.raises(ValueError, match="does not fit the model"):
        load_weights(make_model("gpt2", lora_name=None), tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, "lora"),
        ({"lora_name": None}, "all"),
        ({"lora_name": None, "train": "all"}, "all"),
        ({"train": "lora"}, "lora"),
    ],
)
def test_what_is_trained_where_nothing_is_said(options, trained):
    assert BackboneConfig("llm", **options).trained == trained


def test_all_weights_are_trained(make_model):
    assert all(p.requires_grad for p in make_model(lora_name=None, train="all").parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "biases"}, "train='biases': with lora_name='ullme'; .* need lora_name: null"),
        ({"train": "lora", "lora_name": None}, "train='lora': with lora_name=None"),
        ({"train": "heads"}, "train='heads': choose lora, biases or all"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing='yes': choose true, false or auto"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig("llm", **options)


def test_an_llm_without_biases_is_refused(make_model):
    with pytest.raises(ValueError, match=r"train=biases, but .*\(llama\) has none"):
        make_model("llama", lora_name=None, train="biases")
