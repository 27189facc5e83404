"""Mined rows on disk: a part for each block of rows, and the whole file once all parts are there.

``FILE.parts`` beside the file holds ``settings.json`` and ``part-00000.jsonl`` ..., each there whole or not at all, so
that a command that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from ullme.utils import atomic_files

OnFewer = Literal["keep", "skip", "stop"]

SETTINGS = "settings.json"


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
        if self.file.exists() and not self.folder.exists():
            raise ValueError(
                f"--to {file} exists already, and no {self.folder.name} of the same command beside it; remove it, or "
                "name another file"
            )
        atomic_files.check_writable(self.file.absolute().parent, "--to")

    def check(self, settings: dict[str, Any]) -> None:
        """Write down what the parts depend on, or compare it with what is there.

        Args:
            settings: option -> value, as JSON.

        Raises:
            ValueError: the parts are of another command.
        """
        path = self.folder / SETTINGS
        if not path.exists():
            text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
            atomic_files.write_atomically(path, lambda stream: stream.write(text.encode()), "--to")
            return
        atomic_files.sweep(self.folder)
        atomic_files.sweep(self.file.absolute().parent, f"*.{self.file.name}")
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove {self.folder} and run the command again") from None
        for name in sorted({*there, *settings}):
            if there.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.folder} holds rows of another command: {name} was {there.get(name)!r:.80} and is "
                    f"{settings.get(name)!r:.80} now; give another --to, remove the folder, or give the same options "
                    "to go on"
                )

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:05d}.jsonl"

    def write(self, number: int, lines: list[dict[str, Any]]) -> None:
        """Write a part. Raises: StorageError: it cannot be written."""
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        atomic_files.write_atomically(self.path(number), lambda stream: stream.write(content), "--to")

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
            with self.path(number).open("rb") as file:
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
