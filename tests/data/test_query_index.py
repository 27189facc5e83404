"""Rows sorted by the hashes of their queries, in files and in memory."""

from __future__ import annotations

import numpy as np
import pytest

from ullme.data import query_index
from ullme.data.number_files import Numbers
from ullme.data.query_index import QueryIndex, fence_of, sorted_hashes, write_sorted_hashes


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_files_hold_what_is_sorted_in_memory(tmp_path, block, monkeypatch):
    """Every hash comes several times, and the largest has all 32 bits; rows of one hash stay in their order."""
    monkeypatch.setattr(query_index, "_BLOCK", block)
    hashes = np.random.default_rng(0).integers(0, 2**32, 40, dtype=np.uint32)[np.arange(101) % 40]
    hashes[17], hashes[90] = 2**32 - 1, 0
    np.save(tmp_path / "queries.npy", hashes)
    write_sorted_hashes(tmp_path / "queries.npy", tmp_path)
    found = [np.load(tmp_path / f"{name}.npy") for name in ("query_hashes", "query_rows")]
    expected = sorted(range(101), key=lambda row: (hashes[row], row))
    assert found[1].tolist() == expected != list(range(101))
    assert found[0].tolist() == [hashes[row] for row in expected]
    for one, other in zip(found, sorted_hashes(hashes), strict=True):
        assert one.tolist() == other.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "query_fence.npy",
        "query_hashes.npy",
        "query_rows.npy",
    ]


@pytest.mark.parametrize("step", [1, 2, 3, 8, 1024])
@pytest.mark.parametrize("count", [1, 2, 16, 61])
def test_the_rows_of_a_hash(tmp_path, step, count, monkeypatch):
    """Hashes that come once, several times, and more often than there are rows between two of the fence."""
    monkeypatch.setattr(query_index, "_STEP", step)
    hashes = np.random.default_rng(1).choice([0, 3, 4, 5, 9, 2**32 - 1], count, p=[0.1, 0.1, 0.1, 0.5, 0.1, 0.1])
    hashes = hashes.astype(np.uint32)
    np.save(tmp_path / "queries.npy", hashes)
    write_sorted_hashes(tmp_path / "queries.npy", tmp_path)
    stored = [Numbers(tmp_path / f"query_{name}.npy") for name in ("hashes", "rows")]
    in_memory = sorted_hashes(hashes)
    for index in (
        QueryIndex(*stored, np.load(tmp_path / "query_fence.npy")),
        QueryIndex(*map(Numbers, in_memory), fence_of(in_memory[0])),
    ):
        for wanted in (0, 1, 3, 4, 5, 6, 9, 10, 2**32 - 2, 2**32 - 1):
            rows = np.flatnonzero(hashes == wanted).tolist()
            assert (index.rows(wanted), index.count(wanted)) == (rows, len(rows))
