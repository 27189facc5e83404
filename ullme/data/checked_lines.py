"""Single lines of files, which must be the files that were checked."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ullme.data.jsonl import LineReader
from ullme.data.row_index import sample_digest

# Seconds between two looks at whether a file has changed since it was checked.
SECONDS_BETWEEN_CHECKS = 1.0


class CheckedLines:
    """Lines by their byte offset; now and then it is looked whether their file has changed.

    Args:
        files: that are read.
        identities: of each, from :func:`ullme.data.row_index.file_identity`, when it was checked; None for a copy that
            nobody else writes to.
    """

    def __init__(self, files: list[Path], identities: Sequence[list[Any] | None]) -> None:
        self._lines = LineReader(files)
        self._identities = list(identities)
        self._next_checks = [0.0] * len(files)  # time.monotonic() from which a file is looked at again

    def read(self, file: int, offset: int) -> bytes:
        """The line that starts at a byte of a file. Raises: ValueError: the file is not the one that was checked."""
        if time.monotonic() >= self._next_checks[file]:
            self.check(file)
        return self._lines.read(file, offset)

    def check(self, file: int) -> None:
        """Raises: ValueError: the file is gone, or not the one that was checked. One that only got longer is."""
        self._next_checks[file] = time.monotonic() + SECONDS_BETWEEN_CHECKS
        try:
            handle = self._lines.handle(file)
        except OSError as error:
            raise ValueError(
                f"data.train: {self._lines.files[file]} cannot be read any more ({error.strerror}); put it back as it "
                "was, and resume the run"
            ) from error
        if (identity := self._identities[file]) is None:
            return
        status = os.fstat(handle.fileno())
        path, size, *times, digest = identity
        if [status.st_size, status.st_mtime_ns, status.st_ctime_ns] == [size, *times]:
            return
        if status.st_size < size or sample_digest(handle, size) != digest:
            raise ValueError(
                f"data.train: {path} changed since its rows were checked; train on a copy that nobody writes to (the "
                "run can be resumed, with the rows as they were)"
            )
        self._identities[file] = [path, size, status.st_mtime_ns, status.st_ctime_ns, digest]
