"""Read JSONL files line by line, with line numbers for error messages and byte offsets for random access."""

from __future__ import annotations

import io
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ullme.data.bad_row import BadRow
from ullme.utils.progress import progress

# Bytes: a longer line is no row, and would not fit into the memory of a small machine.
LONGEST_LINE = 1 << 28
# Kinds of compressed files of JSON lines, as pyarrow calls them.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def iter_lines(path: Path, copy: BinaryIO | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, byte offset, raw line) of every non-blank line.

    A UTF-8 byte order mark at the start is skipped. Large files get a progress bar.

    Args:
        path: of the file; one that ends in .gz or .zst is decompressed, and offsets are those in ``copy``.
        copy: takes all bytes as they are read.

    Raises:
        ValueError: a compressed file that is damaged or cut off.
    """
    offset = 0
    total = None if path.suffix.lower() in COMPRESSIONS else path.stat().st_size
    bar = progress(f"reading {path.name}", total=total, unit="B", unit_scale=True)
    with _open(path) as file, bar:
        for number, line in enumerate(_lines(file, path), start=1):
            start = offset
            offset += len(line)
            bar.update(len(line))
            if copy is not None:
                copy.write(line)
            if number == 1 and line.startswith(BOM_UTF8):
                line, start = line[len(BOM_UTF8) :], start + len(BOM_UTF8)  # noqa: PLW2901
            if line.strip():
                yield number, start, line


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed."""
    if (kind := COMPRESSIONS.get(path.suffix.lower())) is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=kind), 1 << 20)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines that fit into memory. Raises: ValueError: damaged, cut off, or a longer line."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(LONGEST_LINE + 1)
        except OSError as error:
            raise ValueError(f"{path}:{number}: cannot be read ({error}); the file is damaged or cut off") from error
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; write one JSON object a line"
            )
        if not line:
            return
        yield line


def decode_line(line: bytes) -> str:
    """The text of a line. Raises: BadRow: it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start} of the line: {error.reason}); save the file as UTF-8") from None


def parse_line(line: bytes) -> Any:
    """The value of a line. Raises: BadRow: the line is not UTF-8 or not JSON."""
    text = decode_line(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"broken JSON ({error}); a file holds one JSON object a line") from None


class LineReader:
    """Single lines of files by their byte offset, also after a pickle or a fork.

    Args:
        files: the files.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._handles: dict[int, BinaryIO] = {}
        self._pid = os.getpid()

    def read(self, file: int, offset: int) -> bytes:
        """The line that starts at a byte of a file."""
        handle = self.handle(file)
        handle.seek(offset)
        return handle.readline()

    def handle(self, file: int) -> BinaryIO:
        """The open file, of this process alone."""
        # a forked worker would share the parent's file position, so it opens the files again
        if self._pid != os.getpid():
            self._handles, self._pid = {}, os.getpid()
        if file not in self._handles:
            self._handles[file] = self.files[file].open("rb")
        return self._handles[file]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}
