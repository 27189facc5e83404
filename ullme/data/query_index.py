"""Which rows have a query: rows by a hash of their query, sorted within mapped files, so that memory does not grow."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

# Rows in memory at once while the index is written.
_BLOCK = 1 << 20
_HASHES, _ROWS = "query_hashes", "query_rows"


def sorted_hashes(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (rows,) hashes of rows, sorted, and the row of each; rows of the same hash stay in their order."""
    rows = np.argsort(hashes, kind="stable")
    return hashes[rows], rows


def write_sorted_hashes(hashes: Path, folder: Path) -> None:
    """As :func:`sorted_hashes`, from a file to the files ``query_hashes.npy`` and ``query_rows.npy``.

    A hash and its row are one number of 64 bits, so that sorting these numbers in place, in a mapped file, sorts equal
    hashes by row. Sorting in memory would take 16 bytes a row, 1.6 GB for 100 million.

    Args:
        hashes: .npy file of (rows,) uint32, of fewer than 2^32 rows; it is removed.
        folder: of the files.

    Raises:
        OSError: the disk is full.
    """
    unsorted = np.load(hashes, mmap_mode="r")
    count = len(unsorted)
    blocks = [slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
    place = hashes.with_name("pairs.npy")
    pairs = _mapped(place, np.uint64, count)
    for block in blocks:
        rows = np.arange(block.start, block.stop, dtype=np.uint64)
        pairs[block] = (unsorted[block].astype(np.uint64) << np.uint64(32)) | rows
    pairs.sort()
    shifts = {_HASHES: np.uint64(32), _ROWS: np.uint64(0)}
    for name, shift in shifts.items():
        found = _mapped(folder / f"{name}.npy", np.uint32, count)
        for block in blocks:
            found[block] = (pairs[block] >> shift).astype(np.uint32)  # the lower half
        found.flush()
    place.unlink()
    hashes.unlink()


def _mapped(path: Path, dtype: type[np.generic], count: int) -> np.memmap:
    """A new .npy file of (count,), mapped into memory. Its space is taken at once: where a disk becomes full under a
    mapping, the process dies without a word.

    Raises:
        OSError: there is not so much.
    """
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(count,))
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped
