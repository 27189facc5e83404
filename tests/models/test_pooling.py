from __future__ import annotations

import pytest
import torch

from ullme.models.pooling import POOLING_METHODS, pool, pool_padded


def naive(hidden: torch.Tensor, mask: torch.Tensor, method: str) -> torch.Tensor:
    rows = []
    for states, real in zip(hidden, mask, strict=True):
        kept = [state for state, m in zip(states, real, strict=True) if m]
        weights = {
            "mean": [1] * len(kept),
            "weighted_mean": range(1, len(kept) + 1),
            "first": [1] + [0] * (len(kept) - 1),
            "last": [0] * (len(kept) - 1) + [1],
        }[method]
        rows.append(sum(w * k for w, k in zip(weights, kept, strict=True)) / sum(weights))
    return torch.stack(rows)


@pytest.mark.parametrize("method", POOLING_METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_against_a_naive_loop(method, side):
    hidden = torch.randn(3, 7, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    kept = mask.clone()
    pooled = pool_padded(hidden, mask, method)
    torch.testing.assert_close(pooled, naive(hidden, mask, method), rtol=1e-13, atol=1e-13)
    assert torch.equal(mask, kept)  # the released original edited it in place


def test_methods_differ():
    hidden, lengths = torch.randn(6, 4), torch.tensor([4, 2])
    results = [pool(hidden, lengths, method) for method in POOLING_METHODS]
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(results) for b in results[:n])


@pytest.mark.parametrize("method", POOLING_METHODS)
def test_gradient(method):
    hidden = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: pool(h, torch.tensor([4, 2]), method), hidden)


def test_half_precision_accumulates_in_float32():
    ones = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    ones[0] = 3.0
    pooled = pool(ones, torch.tensor([4096]))
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(4098 / 4096, abs=1e-7)


def test_unknown_method():
    with pytest.raises(ValueError, match="pooling='median' is unknown; choose one of mean"):
        pool(torch.randn(2, 2), torch.tensor([2]), "median")
