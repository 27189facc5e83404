"""The memory model against what PyTorch's allocator says of a real step on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import save_llm
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ullme.models import ULLME
from ullme.planning.flops import ModelCost, meta_model
from ullme.planning.memory import Activations, _attention, _saved_bytes, _Traffic, activations, predict

TOKENS = 512


def peak_bytes(step, folder) -> int:
    """The most bytes that were allocated at once during ``step``, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    record.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = [e for e in sorted(events, key=lambda e: e["ts"]) if e["name"] == "[memory]"]
    live = peak = 0
    for event in changes:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.0), ("llama", 0.1), ("gpt2", 0.1)])
def test_activations_are_what_a_step_allocates(tmp_path, family, dropout, checkpointing):
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 688, "num_key_value_heads": 4}
    folder = save_llm(tmp_path, family, **sizes, head_dim=64)
    model = ULLME(folder, lora_dropout=dropout, gradient_checkpointing=checkpointing, dtype="float32").train()
    counted = activations(meta_model(model.causal_lm.config, model.options), torch.float32)
    assert model.causal_lm.config._attn_implementation == "ullme_sdpa"  # counting left the real model alone
    rows = torch.randint(3, 300, (TOKENS // 64, 64))

    def step() -> None:
        model(rows)["rep"].square().sum().backward()

    step()  # gradients are there from now on
    assert counted.peak(TOKENS, checkpointing) == pytest.approx(peak_bytes(step, tmp_path), rel=0.1)


@pytest.mark.parametrize(("dtype", "half"), [("bfloat16", True), ("float32", True), ("float32", False)])
@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_precision_is_that_of_a_run(family, dtype, half, llm_folder, monkeypatch):
    """A token's saved tensors as in a forward of ULLME under the trainer's autocast, with the kernel's in attention."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 512}
    model = ULLME(llm_folder(family, **sizes), dtype=dtype, lora_r=4, lora_dropout=0.2).train()
    counted = activations(
        meta_model(model.causal_lm.config, model.options, getattr(torch, dtype)),
        torch.bfloat16 if half else torch.float32,
    )
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "ullme_sdpa", _attention)

    def saved(rows: int) -> int:
        ids = torch.ones(rows, 64, dtype=torch.long)

        def run() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return model(ids)["rep"]

        return _saved_bytes(run)

    pooled = 4 * 64  # in float32, and a few bytes of packing
    assert counted.saved > 10 * pooled
    assert (saved(8) - saved(4)) / 256 == pytest.approx(counted.saved + pooled, abs=pooled / 8)


def test_weights_are_not_activations(llm_folder):
    """Twice the tokens are twice the bytes, and mixed precision keeps half-size activations."""
    from ullme.models.config import BackboneConfig
    from ullme.models.loading import load_config

    options = BackboneConfig(llm_folder("llama"), lora_dropout=0.0)
    full = activations(meta_model(load_config(options), options), torch.float32)
    half = activations(meta_model(load_config(options), options, torch.bfloat16), torch.bfloat16)
    assert full.layers == half.layers == 2
    assert 0.45 * full.saved < half.saved < 0.75 * full.saved  # norms stay in float32
    assert full.peak(20, False) == 2 * full.peak(10, False)


def test_what_kernels_move_by_hand():
    """Two reads and a write of 8 numbers, a read and a write of 4, nothing of a product or a view."""
    with _Traffic() as traffic:
        a, b = torch.ones(2, 4), torch.ones(2, 4)
        before = traffic.bytes
        (a + b)[:1].exp() @ b.T
    assert traffic.bytes - before == 4 * (3 * 8 + 2 * 4)


COST = ModelCost(
    linear=800, adapter=50, head=100, attention_layers=2, attention_width=8, parameters=1050, trainable=50, full=False
)
ACTS = Activations(saved=100, layers=2, boundary=10, transient=5)
OPTIONS = {
    "weight_bytes": 2,
    "compute_bytes": 2,
    "shards": 1,
    "ddp_buckets": False,
    "frozen_copy": False,
    "checkpointing": False,
    "embed_tokens": 10,
    "generation_tokens": 12,
    "single_chunk": False,
    "head_logits": 7,
    "similarities": 3,
    "kind": "cpu",
}


def test_prediction_by_hand():
    one = predict(COST, ACTS, **OPTIONS)
    assert one.weights == 1000 * 2 + 50 * 4
    assert one.training == 50 * 4 * 3  # gradient and two moments in float32
    assert one.reference == 0
    assert one.activations == 12 * 105
    assert one.head == 7 * (2 * 2 + 2 * 4)
    assert one.batch == 12
    assert one.overhead == pytest.approx(0.4 * 2**30 + 0.5 * (one.activations + one.head))
    assert one.total == pytest.approx(sum(vars(one).values()))


def test_what_each_option_changes():
    def change(**options):
        return predict(COST, ACTS, **{**OPTIONS, **options})

    assert change(checkpointing=True).activations == 12 * (2 * 10 + 50 + 5)
    assert change(single_chunk=True).activations == 22 * 105
    assert change(frozen_copy=True).reference == 1000 * 2
    assert change(ddp_buckets=True).training == 50 * 4 * 4
    shared = change(shards=4)
    assert shared.weights == 1000 * 2 / 4 + 50 * 4 + 800 * 2  # two of two layers are gathered at once
    assert shared.training == 50 * 4 * 3
    for quantization, stored in (("nf4", 0.516), ("int8", 1.0)):
        expected = 200 * 2 + 800 * stored + 50 * 4 + 400 * 2
        assert change(quantization=quantization).weights == pytest.approx(expected)
    assert change(weight_bytes=4).weights == 1000 * 4 + 50 * 4 + 800 * 2  # autocast keeps the weights again
