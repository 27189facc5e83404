"""Copying into groups and back gives index_select's values and gradients."""

from __future__ import annotations

import torch

from ullme.models.attention.packed_rows import PackedRows
from ullme.models.attention.reorder import from_groups, to_groups


def test_as_index_select():
    rows = PackedRows([7, 3, 8, 1], torch.device("cpu"))
    positions, inverse = rows.grouping.positions, rows.grouping.ungroup_index
    assert len(positions) > len(inverse), "without padding there is nothing to test"
    x = torch.randn(19, 2, 3, dtype=torch.float64)
    weights = torch.randn(len(positions), 2, 3, dtype=torch.float64)
    real = torch.zeros(len(positions), 1, 1, dtype=torch.float64).index_fill(0, inverse, 1.0)
    found = []
    for into, back in (
        (lambda t: to_groups(t, positions, inverse), lambda t: from_groups(t, inverse)),
        (lambda t: t.index_select(0, positions), lambda t: t.index_select(0, inverse)),
    ):
        leaf = x.clone().requires_grad_()
        grouped = into(leaf)
        out = back((grouped * weights * real).cumsum(0))  # the gradient of padding's output is not zero, its input's is
        (out * out).sum().backward()
        found.append((out.detach(), leaf.grad))
    assert found[1][1].abs().min() > 0
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
