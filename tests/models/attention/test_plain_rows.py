"""Attention on a CPU where the rows lie, beside softmax(Q Kᵀ · scale) V of each row by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ullme.models.attention import packing, plain_rows
from ullme.models.attention.packed_rows import PackedRows

CPU = torch.device("cpu")
LENGTHS = [5, 5, 3, 1, 4, 4, 4]


def inputs(key_heads: int = 2) -> list[Tensor]:
    """Query, key and value as a decoder gives them: the heads of a token are contiguous."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, sum(LENGTHS), h, 8, generator=generator).double() for h in (4, key_heads, key_heads)]
    return [x.transpose(1, 2).requires_grad_() for x in tokens]


def by_formula(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """Row after row, (1, T, H, head_dim)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    found = []
    for q, k, v in zip(*(x.split(LENGTHS, dim=2) for x in (query, key, value)), strict=True):
        scores = q @ k.mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf"))
        found.append((scores.softmax(-1) @ v).transpose(1, 2))
    return torch.cat(found, dim=1)


def test_runs_are_consecutive_rows_of_equal_length():
    assert PackedRows(LENGTHS, CPU).runs == [(2, 5), (1, 3), (1, 1), (3, 4)]
    assert PackedRows([7], CPU).runs == [(1, 7)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_values_and_gradients_are_those_of_the_formula(key_heads, causal):
    leaves = inputs(key_heads)
    rows = PackedRows(LENGTHS, CPU)
    found = []
    for out in (by_formula(*leaves, 0.3, causal), plain_rows.attention(*leaves, rows, 0.3, causal)):
        found.append([out, *torch.autograd.grad(out.pow(3).sum(), leaves)])
    assert min(x.abs().max() for x in found[0]) > 0.1
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"window": 2}, False),
        ({"softcap": 5.0}, False),
        ({"dropout": 0.5}, False),
        ({"parents": [-1, 0, -1, -1, -1, 4, 4]}, False),
    ],
)
def test_only_plain_attention_runs_so(options, plain, monkeypatch):
    used = []
    for name in ("plain", "grouped"):
        target = (plain_rows, "attention") if name == "plain" else (packing, "_grouped_attention")
        monkeypatch.setattr(*target, lambda query, *_, name=name: used.append(name) or query)
    rows = PackedRows(LENGTHS, CPU, options.get("parents"))
    other = (options.get(name) for name in ("window", "softcap"))
    packing.attention_without_varlen(*inputs(), rows, None, True, *other, options.get("dropout", 0.0))
    assert used == ["plain" if plain else "grouped"]


def test_autocast_gives_one_dtype():
    """A norm on queries and keys leaves these in float32, while the projection of values follows autocast."""
    query, key, value = (x.detach().float() for x in inputs())
    rows = PackedRows(LENGTHS, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packing.attention_without_varlen(query, key, value.bfloat16(), rows, 0.3, False, None, None, 0.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_formula(query, key, value, 0.3, False), rtol=0.05, atol=0.05)
