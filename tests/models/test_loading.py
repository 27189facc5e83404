"""An embedder from a name, a checkpoint or both."""

from __future__ import annotations

import pytest
import torch

from ullme.models.checkpoint import load_embedder, save_adapter, usable_device
from ullme.prompts import Prompts


def test_a_name_alone_is_the_llm_untrained(llm_folder):
    model = load_embedder(llm_folder(), None, {"lora_r": 4, "prompts": {"query": "q: {text}"}})
    assert model.options.lora_name is None
    assert model.prompts == Prompts(query="q: {text}")


def test_a_checkpoint_brings_its_own_llm_and_prompts(make_model, tmp_path):
    trained = make_model(prompts=Prompts(query="q: {text}"))
    loaded = load_embedder(None, save_adapter(trained, tmp_path / "run"), {})
    expected = trained.encode(["x"], role="query", convert_to_tensor=True)
    assert torch.equal(loaded.encode(["x"], role="query", convert_to_tensor=True), expected)


def test_mistakes():
    with pytest.raises(ValueError, match="give at least one"):
        load_embedder(None, None, {})
    with pytest.raises(ValueError, match="device='cuda:9' cannot be used here"):
        usable_device("cuda:9")
    assert usable_device("cpu") == "cpu"
