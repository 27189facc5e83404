"""Numbers of rows in .npy files, of which only those that are asked for are in memory."""

from __future__ import annotations

import os
import sys
from array import array
from operator import index
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

_BUFFERED = 1 << 16


class NumbersWriter:
    """A growing one-dimensional .npy file; what is appended is in memory only until the next block is written.

    Args:
        path: of the file.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._buffer = array("q")
        self._file = path.open("wb")
        self._write_header()

    def append(self, number: int) -> None:
        """Add a number at the end."""
        self._buffer.append(number)
        self.count += 1
        if len(self._buffer) == _BUFFERED:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the number of numbers into the header."""
        self._flush()
        self._file.seek(0)
        self._write_header()  # numpy leaves room for a longer shape
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _flush(self) -> None:
        np.asarray(self._buffer).astype(self.dtype).tofile(self._file)
        self._buffer = array("q")

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class Numbers:
    """Numbers in memory, or in a .npy file that is read where it is asked for. A mapped file would do as well, but each
    page of it that was ever looked at counts as memory of the process.

    Args:
        source: (n,) the numbers, or the path of the file, which a pickle holds instead of its numbers.
        in_use: an open file that keeps the entry of the cache, see :func:`ullme.data.row_cache.use`.
    """

    def __init__(self, source: np.ndarray | Path, in_use: IO[bytes] | None = None) -> None:
        self.source: Any = source
        self._stored = isinstance(source, Path)
        self._in_use = in_use
        self._file: IO[bytes] | None = None
        if isinstance(source, Path):
            with source.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
                self._count, self._start = shape[0], file.tell()
        else:
            self._count, self._start, self.dtype = len(source), 0, source.dtype
        self._size = self.dtype.itemsize

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, places: int) -> int: ...
    @overload
    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray: ...
    def __getitem__(self, places: int | slice | np.ndarray) -> int | np.ndarray:
        """The number at a place, those of a range without steps, or those at (m,) places."""
        if isinstance(places, int):
            # quicker than by numpy; no number is negative
            return int.from_bytes(self._bytes(places, 1), sys.byteorder) if self._stored else int(self.source[places])
        if isinstance(places, slice):
            start, stop, _ = places.indices(self._count)
            return self._read(start, stop)
        if isinstance(places, np.ndarray):
            mapped = np.load(self.source, mmap_mode="r") if self._stored else self.source
            return np.asarray(mapped[places])
        return self[index(places)]  # an integer of numpy

    def view(self, start: int, stop: int) -> memoryview:
        """Those of a range, of which there may be fewer, for single looks at them."""
        count = max(0, min(stop, self._count) - start)
        read = self._bytes(start, count) if self._stored else self.source[start : start + count].tobytes()
        view: Any = memoryview(read)
        return view.cast(self.dtype.char)

    def tolist(self) -> list[int]:
        """All numbers, read into memory."""
        return self[:].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_in_use": None}

    def _read(self, start: int, stop: int) -> np.ndarray:
        if not self._stored:
            return self.source[start:stop]
        return np.frombuffer(self._bytes(start, max(0, stop - start)), self.dtype)

    def _bytes(self, start: int, count: int) -> bytes:
        """Of ``count`` numbers of the file; its position, which forked processes share, stays."""
        if self._file is None:
            self._file = self.source.open("rb", buffering=0)
        return os.pread(self._file.fileno(), count * self._size, self._start + start * self._size)
