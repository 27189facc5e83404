"""Which rows have a query: rows by a hash of their query, sorted in files, so that memory does not grow with them."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left, bisect_right
from pathlib import Path

import numpy as np

from ullme.data.number_files import Numbers

# Rows in memory at once while the index is written.
_BLOCK = 1 << 20
_HASHES, _ROWS, _FENCE = "query_hashes", "query_rows", "query_fence"
# Rows between two fence pointers (every so many of the sorted hashes, in memory, to find a block of the file).
_STEP = 1024


class QueryIndex:
    """The rows that have a query, found by a hash of it.

    Args:
        hashes: (rows,) 32-bit hashes of the rows' queries, sorted.
        rows: (rows,) the row of each hash.
        fence: fence pointers, every 1,024th of the hashes, which are in memory; see :func:`fence_of`.
    """

    def __init__(self, hashes: Numbers, rows: Numbers, fence: np.ndarray) -> None:
        self._hashes, self._rows = hashes, rows
        self._fence = array("I", fence.tobytes())  # whose single numbers are quicker to look at than numpy's

    def rows(self, query_hash: int) -> list[int]:
        """The rows with this hash."""
        return self._rows[self._places(query_hash)].tolist()

    def count(self, query_hash: int) -> int:
        """How many they are."""
        places = self._places(query_hash)
        return places.stop - places.start

    def _places(self, query_hash: int) -> slice:
        """Of the hash among all: they begin between two hashes of the fence, and mostly end there too."""
        start = max(0, bisect_left(self._fence, query_hash) - 1) * _STEP
        block = self._hashes.view(start, start + _STEP + 1)
        first = bisect_left(block, query_hash)
        last = bisect_right(block, query_hash, first)
        if last < len(block):
            return slice(start + first, start + last)
        end = max(0, bisect_right(self._fence, query_hash) - 1) * _STEP
        return slice(start + first, end + bisect_right(self._hashes.view(end, end + _STEP), query_hash))


def fence_of(hashes: np.ndarray) -> np.ndarray:
    """Every 1,024th of the (rows,) sorted hashes, the first of them at place 0."""
    return hashes[::_STEP].copy()


def sorted_hashes(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (rows,) hashes of rows, sorted, and the row of each; rows of the same hash stay in their order."""
    rows = np.argsort(hashes, kind="stable")
    return hashes[rows], rows


def write_sorted_hashes(hashes: Path, folder: Path) -> None:
    """As :func:`sorted_hashes`, from a file to ``query_hashes.npy``, ``query_rows.npy`` and ``query_fence.npy``.

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
        if name == _HASHES:
            np.save(folder / f"{_FENCE}.npy", fence_of(found))
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
