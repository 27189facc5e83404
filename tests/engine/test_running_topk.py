"""The k best, whatever the order in which documents arrive and however they are divided over ranks."""

from __future__ import annotations

import pytest
import torch

from ullme.engine import topk
from ullme.engine.topk import RunningTopK


def test_documents_may_arrive_in_any_order():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (5, 60), generator=draw).float()
    scores[:, 7] = -torch.inf  # is not ranked
    expected = scores.sort(dim=1, descending=True, stable=True)
    found = {}
    for name, rows in {"in order": torch.arange(60), "shuffled": torch.randperm(60, generator=draw)}.items():
        best = RunningTopK(5, 59)
        for part in rows.split(7):
            best.add(scores[:3, part], part)
            best.add(scores[3:, part], part, first_query=3)
        found[name] = best.result()
    assert not torch.equal(expected.indices[:, :59], torch.arange(59).expand(5, 59))
    for values, rows in found.values():
        assert torch.equal(values, expected.values[:, :59])
        assert torch.equal(rows, expected.indices[:, :59])
    fewer = RunningTopK(5, 60)
    fewer.add(scores, torch.arange(60))
    assert fewer.result()[1][:, 59].tolist() == [-1] * 5


def test_keys_keep_every_float_in_order():
    special = [-torch.inf, -3.5, -1e-30, -0.0, 0.0, 1e-45, 1.0, torch.inf]
    scores = torch.tensor([special])
    keys = topk._keys(scores, torch.arange(len(special)))
    assert torch.equal(topk._scores(keys), scores + 0.0)
    assert topk._rows(keys).tolist() == [[-1, *range(1, len(special))]]
    assert keys[0].argsort(descending=True).tolist() == [7, 6, 5, 3, 4, 2, 1, 0]  # -0.0 is 0.0, and comes first


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        RunningTopK(1, 0)
