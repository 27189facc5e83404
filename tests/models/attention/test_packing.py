"""Which attention runs packed rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ullme.models.attention import packing
from ullme.models.attention.packed_rows import PackedRows


def heads(width: int, value_width: int | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple:
    query = torch.empty(1, 4, 6, width, dtype=dtype)
    return query, torch.empty(1, 4, 6, value_width or width, dtype=dtype)


@pytest.mark.parametrize(
    ("query", "value", "taken"),
    [
        (*heads(64), True),
        (*heads(256), True),
        (*heads(264), False),  # too wide
        (*heads(60), False),  # no multiple of 8
        (*heads(192, 128), False),  # multi-head latent attention
        (*heads(64, dtype=torch.float32), False),
    ],
)
def test_the_kernel_is_given_only_heads_that_it_has(query, value, taken):
    assert packing._kernel_takes(query, value) is taken


def test_values_of_another_width_run_in_groups():
    """Multi-head latent attention: by hand, row after row."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 4, 9, 12, dtype=torch.double) for _ in range(2))
    value = torch.randn(1, 4, 9, 8, dtype=torch.double)
    rows = PackedRows([5, 4], torch.device("cpu"))
    keywords = {packing.ROWS_KEYWORD: rows, "is_causal": False}
    found, _ = packing.packed_attention("sdpa", torch.nn.Module(), query, key, value, None, **keywords)
    for row in (slice(0, 5), slice(5, 9)):
        weights = (query[:, :, row] @ key[:, :, row].mT * 12**-0.5).softmax(-1)
        torch.testing.assert_close(found[:, row], (weights @ value[:, :, row]).transpose(1, 2))


@pytest.mark.parametrize("newer", [False, True])
def test_keys_that_query_heads_share_are_not_repeated(newer, monkeypatch):
    """torch 2.11 has no parameter that says so; its kernel shares them all the same."""
    given = []

    def kernel(q, k, v, *args, **kwargs):
        given.append((k.shape[1], v.shape[1], kwargs.get("enable_gqa")))
        return q

    monkeypatch.setitem(__import__("sys").modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=kernel))
    known = {"window_size", "enable_gqa"} if newer else {"window_size"}
    monkeypatch.setattr(packing, "_varlen_has_parameter", known.__contains__)
    query, key = torch.zeros(1, 8, 6, 16), torch.zeros(1, 2, 6, 16)
    packing._varlen_attention(query, key, key, PackedRows([6], torch.device("cpu")), None, False, None)
    assert given == [(2, 2, True if newer else None)]
