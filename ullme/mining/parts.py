"""Mined rows on disk: a part for each block of rows in ``FILE.parts``, and the whole file once all parts are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from ullme.utils import atomic_files
from ullme.utils.part_files import PartFiles

OnFewer = Literal["keep", "skip", "stop"]


@dataclass
class Written:
    """What stands in the file.

    Args:
        rows: written.
        negatives: of all of them.
        fewer: rows that got fewer negatives than were asked for.
        left_out: rows of these that are not in the file.
        first: where the first of them is, and how many negatives it has.
        outside: positives that are not in the corpus.
    """

    rows: int = 0
    negatives: int = 0
    fewer: int = 0
    left_out: int = 0
    first: tuple[int, int] | None = None
    outside: int = 0


class Parts:
    """The parts of a file.

    Args:
        file: that will be written.

    Raises:
        ValueError: the file is no .jsonl, or its folder cannot be written.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        if self.file.suffix != ".jsonl":
            raise ValueError(f"--to {file}: the rows are JSON lines; name it {self.file.stem}.jsonl")
        self.folder = self.file.with_name(f"{self.file.name}.parts")
        self._files = PartFiles(self.folder, "rows")
        if self.file.exists() and not self.folder.exists():
            raise ValueError(
                f"--to {file} exists already, and no {self.folder.name} of the same command beside it; remove it, or "
                "name another file"
            )
        atomic_files.check_writable(self.file.absolute().parent, "--to")

    def check(self, settings: dict[str, Any]) -> None:
        """As :meth:`ullme.utils.part_files.PartFiles.check`."""
        atomic_files.sweep(self.file.absolute().parent, f"*.{self.file.name}")
        self._files.check(settings)

    def has(self, number: int) -> bool:
        """Whether a part is there."""
        return self._files.path(number).exists()

    def write(self, number: int, lines: list[dict[str, Any]]) -> None:
        """Write a part. Raises: StorageError: it cannot be written."""
        self._files.write(number, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def finish(self, parts: int, asked: int, field: str, least: int, on_fewer: OnFewer) -> Written:
        """Write the file from its parts.

        Args:
            parts: how many there are.
            asked: negatives of a row.
            field: of a line that holds them.
            least: a row with fewer cannot be read, so it is left out.
            on_fewer: what to do with a row that got fewer than ``asked``.

        Raises:
            ValueError: ``on_fewer`` is ``stop`` and there is such a row, no row is left, or the disk is full.
        """
        written = self._count(parts, asked, field, least, on_fewer)
        if written.fewer and on_fewer == "stop":
            assert written.first is not None
            row, found = written.first
            raise ValueError(
                f"{written.fewer} of {written.rows} rows have fewer than --num_negatives {asked} (the first is row "
                f"{row + 1}, with {found}); give --on_fewer keep or skip, ask for fewer, or widen the range or the "
                f"margins with another --to; what was mined stays in {self.folder}"
            )
        if not written.rows:
            raise ValueError(
                f"no row is left to write to {self.file}: {written.left_out} rows have fewer than --num_negatives "
                f"{asked}; ask for fewer, give --on_fewer keep, or widen the range or the margins with another --to"
            )

        def write(file: BinaryIO) -> None:
            for line, found in self._lines(parts, field):
                if _is_kept(found, asked, least, on_fewer):
                    file.write(line)

        atomic_files.write_atomically(self.file, write, "--to")
        return written

    def _count(self, parts: int, asked: int, field: str, least: int, on_fewer: OnFewer) -> Written:
        written = Written()
        for row, (_, found) in enumerate(self._lines(parts, field)):
            if found < asked:
                written.fewer += 1
                written.first = written.first or (row, found)
            if _is_kept(found, asked, least, on_fewer):
                written.rows += 1
                written.negatives += found
            else:
                written.left_out += 1
        return written

    def _lines(self, parts: int, field: str) -> Iterator[tuple[bytes, int]]:
        """Every line with the number of its negatives."""
        for number in range(parts):
            with self._files.path(number).open("rb") as file:
                for line in file:
                    yield line, len(json.loads(line)[field])


def _is_kept(found: int, asked: int, least: int, on_fewer: OnFewer) -> bool:
    if on_fewer == "stop":
        return True
    return found >= least and (found >= asked or on_fewer == "keep")


def check_on_fewer(on_fewer: str) -> None:
    """Raises: ValueError: it is none of the choices."""
    if on_fewer not in get_args(OnFewer):
        raise ValueError(f"--on_fewer {on_fewer}: choose {', '.join(get_args(OnFewer))}")
