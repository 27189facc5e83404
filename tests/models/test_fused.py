"""Fused activations and norms compute what the model's own do, and only those are replaced that are equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ullme.models.fused import FusedRMSNorm, _FrozenRMSNorm, fuse

D = 8


class UnusualRMSNorm(LlamaRMSNorm):
    """Passes for a norm of transformers, and is another function."""

    def forward(self, x):
        return super().forward(x) * 1.001


UnusualRMSNorm.__module__ = "transformers.models.unusual"


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("gelu_new", nn.GELU("tanh")),
        ("gelu_pytorch_tanh", nn.GELU("tanh")),
        ("gelu_python", nn.GELU()),
        ("silu", nn.SiLU()),
    ],
)
def test_equal_activations_are_replaced(name, fused):
    model = nn.Sequential(nn.Linear(D, D), ACT2FN[name])
    fuse(model)
    assert type(model[1]) is type(fused)
    assert repr(model[1]) == repr(fused)
    x = torch.linspace(-9, 9, 100, dtype=torch.float64)
    torch.testing.assert_close(model[1](x), ACT2FN[name](x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_10", "relu2", "gelu_fast"])
def test_others_stay(name):
    model = nn.Sequential(ACT2FN[name])
    before = model[0]
    assert fuse(model) == []
    assert model[0] is before


@pytest.mark.parametrize("cls", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("trained", [False, True])
def test_norms_with_gradients(cls, trained):
    torch.manual_seed(0)
    plain = nn.Sequential(cls(D)).requires_grad_(trained)
    nn.init.normal_(plain[0].weight)
    ours = copy.deepcopy(plain)
    fuse(ours)
    assert isinstance(ours[0], FusedRMSNorm)
    assert isinstance(ours[0], cls)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x, weights = torch.randn(2, 3, D), torch.randn(2, 3, D)
    found = []
    for model in (ours, plain):
        leaf = x.clone().requires_grad_()
        (model(leaf) * weights).sum().backward()
        found.append((model(x), leaf.grad, *(p.grad for p in model.parameters() if trained)))
    for a, b in zip(*found, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    exact = x.double()
    assert torch.equal(ours.double()(exact), plain.double()(exact)), "float64 runs the model's own"


def test_the_frozen_norm_by_finite_differences():
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _FrozenRMSNorm.apply(x, weight, 1e-5), (x,))


def test_another_norm_stays():
    model = nn.Sequential(UnusualRMSNorm(D))
    fuse(model)
    assert type(model[0]) is UnusualRMSNorm


def test_without_memory():
    """The planner counts the bytes of the fused model on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(LlamaRMSNorm(D), ACT2FN["gelu_new"])
    assert fuse(model) == ["LlamaRMSNorm", "NewGELUActivation"]
    assert model[0].weight.is_meta


def test_a_loaded_model_is_fused(make_model):
    norms = [m for m in make_model().modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    assert all(isinstance(norm, FusedRMSNorm) for norm in norms)
