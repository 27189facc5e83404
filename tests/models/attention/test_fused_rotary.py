"""The rotation that is replaced in a modelling file computes what the file's own does."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from ullme.models.attention.fused_rotary import _Rotate, fuse_rotary

ORIGINAL = getattr(modeling_llama.apply_rotary_pos_emb, "ullme_original", modeling_llama.apply_rotary_pos_emb)


@pytest.fixture
def family(monkeypatch):
    """A layer whose modelling file has this rotation; gives the file after the layer was fused."""

    def fused(rotate) -> ModuleType:
        name = "transformers.models.toy.modeling_toy"
        source = ModuleType(name)
        source.apply_rotary_pos_emb = rotate
        monkeypatch.setitem(__import__("sys").modules, name, source)
        fuse_rotary(type("Layer", (nn.Module,), {"__module__": name})())
        return source

    return fused


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    query, key = torch.randn(1, 5, 3, 8, dtype=dtype), torch.randn(1, 5, 1, 8, dtype=dtype)
    return [query.transpose(1, 2), key.transpose(1, 2), *(torch.randn(1, 5, 8, dtype=dtype) for _ in range(2))]


@pytest.mark.parametrize(("dtype", "runs"), [(torch.float32, True), (torch.float64, False), (torch.bfloat16, False)])
def test_values_and_gradients(dtype, runs, family, monkeypatch):
    used = []
    forward = _Rotate.forward
    source = family(ORIGINAL)
    monkeypatch.setattr(_Rotate, "forward", lambda *x: used.append(1) or forward(*x))
    query, key, cos, sin = inputs(dtype)
    found = []
    for rotate in (ORIGINAL, source.apply_rotary_pos_emb):
        leaves = [x.clone().requires_grad_() for x in (query, key)]
        out = rotate(*leaves, cos, sin)
        gradients = torch.autograd.grad(sum(x.pow(3).sum() for x in out), leaves)
        found.append([*out, *gradients])
    assert bool(used) is runs
    assert all(value.abs().max() > 0.1 for value in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_by_finite_differences():
    query, _, cos, sin = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x: _Rotate.apply(x, cos[:, None], sin[:, None]), query.requires_grad_())


@pytest.mark.parametrize(
    "other",
    [
        getattr(modeling_cohere.apply_rotary_pos_emb, "ullme_original", modeling_cohere.apply_rotary_pos_emb),
        lambda q, k, cos, sin, unsqueeze_dim=1: (q, k),
        lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1: ORIGINAL(q, k, cos, sin, unsqueeze_dim),
    ],
    ids=["interleaved", "another function", "another parameter"],
)
def test_other_rotations_stay(other, family):
    assert family(other).apply_rotary_pos_emb is other


def test_it_is_replaced_once(family):
    first = family(ORIGINAL).apply_rotary_pos_emb
    assert first is not ORIGINAL
    assert family(first).apply_rotary_pos_emb is first
