"""The gated MLP that keeps less computes what the model's own does, and only such MLPs are replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from ullme.models.fused import fuse
from ullme.models.fused_mlp import FusedGatedMLP

SIZES = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 2, "num_key_value_heads": 2}


class UnusualMLP(LlamaMLP):
    """Has the parts of a gated MLP, and is another function."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


UnusualMLP.__module__ = "transformers.models.unusual"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_to_the_last_bit(dtype):
    torch.manual_seed(0)
    plain = LlamaMLP(LlamaConfig(**SIZES)).to(dtype)
    ours = copy.deepcopy(plain)
    assert "LlamaMLP" in fuse(ours)
    assert isinstance(ours, FusedGatedMLP)
    assert isinstance(ours, LlamaMLP)
    x = torch.randn(2, 3, 6).to(dtype)
    found = []
    for mlp in (plain, ours):
        leaf = x.clone().requires_grad_()
        out = mlp(leaf)
        gradients = torch.autograd.grad(out.pow(2).sum(), [leaf, *mlp.parameters()])
        found.append([out, *gradients])
    assert all(value.abs().max() > 0 for value in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_activation_is_not_kept():
    def kept(mlp: torch.nn.Module) -> int:
        wide = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: wide.append(t.data_ptr()) or t, lambda t: t):
            (leaf := torch.randn(7, 6)).requires_grad_()
            alive = mlp(leaf)
        assert alive.requires_grad
        return len({*wide} - {p.data_ptr() for p in mlp.parameters()})

    mlp = LlamaMLP(LlamaConfig(**SIZES)).requires_grad_(False)
    mlp.down_proj.requires_grad_()
    before = kept(mlp)
    fuse(mlp)
    assert (before, kept(mlp)) == (4, 3)


@pytest.mark.parametrize("mlp", [Gemma2MLP(Gemma2Config(**SIZES)), UnusualMLP(LlamaConfig(**SIZES))])
def test_others_stay(mlp):
    before = type(mlp)
    fuse(mlp)
    assert type(mlp) is before
