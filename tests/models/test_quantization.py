"""quantization: nf4 or int8, which need a GPU: their refusals everywhere, the real thing where there is one."""

from __future__ import annotations

import pytest
import torch

from ullme.models import ULLME, loading
from ullme.models.config import BackboneConfig


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="quantization='int3': choose none, nf4 or int8"):
        BackboneConfig("x", quantization="int3")


def test_none_changes_nothing():
    options = BackboneConfig("x")
    loading.check_quantization(options)
    assert loading.quantization_options(options) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_refused_on_a_cpu_before_anything_is_read(kind):
    with pytest.raises(
        ValueError, match=f"quantization='{kind}': .* CUDA device, and there is none.* quantization=none"
    ):
        ULLME("/no/such/folder", quantization=kind)


def test_refused_without_bitsandbytes(gpu, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed; pip install 'ullme\[quantization\]'"):
        loading.check_quantization(BackboneConfig("x", quantization="nf4"))


def test_refused_without_an_adapter(gpu):
    with pytest.raises(ValueError, match="cannot be trained themselves; set lora_name"):
        loading.check_quantization(BackboneConfig("x", lora_name=None, quantization="nf4"))


def test_what_is_asked_of_bitsandbytes(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    asked = loading.quantization_options(BackboneConfig("x", quantization="nf4"))
    assert asked["device_map"] == {"": 3}
    found = asked["quantization_config"]
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16


def test_eight_bits_are_asked_of_bitsandbytes(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = loading.quantization_options(BackboneConfig("x", quantization="int8"))["quantization_config"]
    assert (asked.load_in_8bit, asked.load_in_4bit) == (True, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("few", "share"), [("nf4", 0.35), ("int8", 0.6)])
def test_trains_an_adapter_on_few_bits(make_model, few, share):
    """Most of the LLM's bytes are gone, embeddings stay near, and gradients point the same way."""
    pytest.importorskip("bitsandbytes")
    from test_gradcache import gradients, make_batch

    from ullme.engine.objective import Objective
    from ullme.losses import InfoNCE

    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "initializer_range": 0.05}
    found = {}
    for kind in ("none", few):
        model = make_model(sizes=sizes, dtype="bfloat16", quantization=kind).cuda().train()
        batch = make_batch().to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            rep = model(batch.queries.input_ids, batch.queries.attention_mask)["rep"]
            Objective([InfoNCE()]).full_batch(model, batch)
        layers = model.causal_lm.base_model.layers.parameters()
        size = sum(p.numel() * p.element_size() for p in layers if not p.requires_grad)
        found[kind] = rep, torch.cat([g.flatten() for g in gradients(model).values()]), size
    assert found[few][2] < share * found["none"][2]
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(found[few][0], found["none"][0]).min() > 0.9
    assert cosine(found[few][1], found["none"][1], dim=0) > 0.8
