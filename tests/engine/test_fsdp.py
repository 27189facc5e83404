"""What FSDP does to the numbers of an LLM, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import MixedPrecision

from ullme.engine import fsdp


@pytest.mark.parametrize("trains_all", [False, True])
def test_fsdp1_leaves_buffers_as_they_are(trains_all):
    """Lightning's own bf16-mixed would round rotary frequencies."""
    from lightning.pytorch.plugins.precision import FSDPPrecision

    lightning = FSDPPrecision("bf16-mixed").mixed_precision_config
    assert lightning.buffer_dtype == torch.bfloat16
    found = fsdp.full_precision_buffers(lightning, trains_all)
    assert found.buffer_dtype is None
    assert found.param_dtype == torch.bfloat16
    assert found.reduce_dtype == (torch.float32 if trains_all else torch.bfloat16)
    assert fsdp.full_precision_buffers(None, trains_all) is None


def test_every_wrap_is_given_the_precision(make_model, monkeypatch):
    """Layers and the model around them: a buffer may lie in either."""
    given = []

    def wrap(module, **options):
        given.append(options["mixed_precision"])
        return module

    monkeypatch.setattr("torch.distributed.fsdp.wrap.wrap", wrap)
    model = make_model("llama")
    fsdp.shard_fsdp1(model, torch.device("cpu"), MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16))
    assert len(given) == 1 + model.causal_lm.config.num_hidden_layers
    assert all(mixed.buffer_dtype is None and mixed.param_dtype == torch.bfloat16 for mixed in given)


@pytest.mark.parametrize(("largest", "factor"), [(None, 1), (10.0, 1), (2.0, 2 / 5)])
def test_clipping_by_hand(largest, factor, make_model):
    """Gradients of 3 and 4 in two weights, 0 elsewhere: their norm is 5."""
    model = make_model("llama")
    first, second, *_ = [p for p in model.parameters() if p.requires_grad]
    for parameter, value in ((first, 3.0), (second, 4.0)):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0, 0] = value
    assert fsdp.clip_gradients(model, largest).item() == pytest.approx(5)
    found = [first.grad[0, 0].item(), second.grad[0, 0].item()]
    assert found == pytest.approx([3 * factor, 4 * factor], rel=1e-5)


def test_the_module_hands_on_the_strategys_precision():
    """The name that training/module.py reads is Lightning's."""
    assert isinstance(FSDPStrategy.mixed_precision_config, property)
