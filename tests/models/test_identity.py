from __future__ import annotations

import pytest
import torch
from torch import nn

from ullme.models.identity import is_sentence_transformer, result_name, weights_digest


@pytest.mark.parametrize(
    ("model_name", "checkpoint", "name"),
    [
        ("mistralai/Mistral-7B-v0.1", None, "mistralai/Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-v0.1", "runs/grl/checkpoints/last.ckpt", "mistralai/Mistral-7B-v0.1--grl-last"),
        ("gpt2", "runs/grl/step=5.ckpt", "local/gpt2--grl-step_5"),
    ],
)
def test_result_names(model_name, checkpoint, name):
    assert result_name(model_name, checkpoint) == name


def test_what_is_a_sentence_transformer(tmp_path, monkeypatch):
    import huggingface_hub

    embedder, llm = tmp_path / "embedder", tmp_path / "llm"
    embedder.mkdir()
    llm.mkdir()
    (embedder / "modules.json").touch()
    asked = []
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda name, file: bool(asked.append(name)) or True)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    assert is_sentence_transformer(str(embedder))
    assert not is_sentence_transformer(str(llm))
    assert not is_sentence_transformer("organisation/embedder")
    assert not is_sentence_transformer("not a / hub name")
    assert asked == []
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    assert is_sentence_transformer("organisation/embedder")
    assert not is_sentence_transformer(str(llm))
    assert asked == ["organisation/embedder"]


def test_weights_digest_sees_every_value_name_and_type():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    first = weights_digest(layer)
    assert weights_digest(layer) == first
    with torch.no_grad():
        layer.bias[1] += 1e-6
    second = weights_digest(layer)
    assert len({first, second, weights_digest(layer.bfloat16()), weights_digest(nn.Sequential(layer))}) == 4
