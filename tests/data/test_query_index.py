"""Rows sorted by the hashes of their queries, in files and in memory."""

from __future__ import annotations

import numpy as np
import pytest

from ullme.data import query_index
from ullme.data.query_index import sorted_hashes, write_sorted_hashes


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["query_hashes.npy", "query_rows.npy"]
