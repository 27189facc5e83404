"""Checking rows once: which are valid, what is wrong with the others, and what is known of all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal
from zlib import crc32

from ullme.data.columns import ColumnKind, ColumnOption, has_number, kind_of, split_option
from ullme.data.jsonl import parse_line
from ullme.data.records import BadRow, Record, Schema, parse_record, unread
from ullme.data.row_index import MOST_NEGATIVES, VERSION, Writer, code_identity, file_identity
from ullme.data.side_files import SideFile

OnBadRow = Literal["stop", "skip"]


def query_hash(query: str) -> int:
    """32 bits, by which the rows of a query are found."""
    return crc32(query.encode())


class RowParser:
    """Raw rows to records, with the columns that ``data.columns`` names.

    Args:
        schema: the columns, see :func:`ullme.data.records.parse_record`.
        columns: see :data:`ullme.data.columns.ColumnOption`.
        cache_dir: of the indices of side files, see :func:`ullme.data.row_index.cached_index`.
    """

    def __init__(self, schema: Schema, columns: ColumnOption, cache_dir: str | None = None) -> None:
        self.schema = schema
        self.fields, files = split_option(columns)
        self.side = {column: SideFile(path, column, cache_dir) for column, path in files.items()}

    def parse(self, raw: Any, number: int) -> Record:
        """A row, or its line of JSON, that is row ``number``, from 0, of all. Raises: BadRow."""
        row = parse_line(raw) if isinstance(raw, bytes) else raw
        return parse_record(row, self.schema, self.fields, {name: file[number] for name, file in self.side.items()})

    def check_side_files(self) -> None:
        """Raises: ValueError: one has changed."""
        for file in self.side.values():
            file.check()

    def unread(self, raw: Any) -> dict[str, Any]:
        """Fields of a valid row that nothing reads."""
        row: Mapping[str, Any] = parse_line(raw) if isinstance(raw, bytes) else raw
        return {name: row.get(name) for name in unread(row, self.schema, self.fields)}


class CheckedRows:
    """Collects the positions of valid rows and the errors of bad ones while a source is checked."""

    def __init__(self, rows: RowParser, on_bad_row: OnBadRow, writer: Writer) -> None:
        self.rows = rows
        self.on_bad_row = on_bad_row
        self.writer = writer
        self.count = self.valid = 0
        self.skipped: list[str] = []
        self.longest_instruction: str | None = None
        self.labelled: bool | None = None
        self.kinds: dict[str, ColumnKind] = {}
        self.columns: dict[str, ColumnKind] = {}
        self.unread: dict[str, Any] = {}
        self._keys: set[frozenset[str]] = set()

    def add(self, position: int, where: str, raw: Any) -> None:
        """Check a row.

        Args:
            position: to store, if the row is valid.
            where: file and line, for messages.
            raw: the row, or its line of JSON.

        Raises:
            ValueError: the row is bad, and on_bad_row is ``stop``.
        """
        number, self.count = self.count, self.count + 1
        try:
            row = parse_line(raw) if isinstance(raw, bytes) else raw
            record = self.rows.parse(row, number)
            self._add_columns(record)
        except BadRow as reason:
            if self.on_bad_row == "stop":
                raise ValueError(f"{where}: {reason}; fix the row or set data.on_bad_row=skip") from None
            self.skipped.append(f"{where}: {reason}")
            return
        if self.labelled is not None and record.labelled != self.labelled:
            raise ValueError(
                f"{where}: a row {'with' if record.labelled else 'without'} a positive among rows "
                f"{'without' if record.labelled else 'with'} one; put the two kinds into two datasets (data.datasets), "
                "so that a batch is of one kind"
            )
        self.labelled = record.labelled
        self.valid += 1
        self.writer.positions.append(position)
        if self.rows.side:  # else nothing asks which row it is among all
            self.writer.numbers.append(number)
        self.writer.num_negatives.append(min(record.num_negatives, MOST_NEGATIVES))
        self.writer.queries.append(query_hash(record.query))
        if record.instruction is not None and len(record.instruction) > len(self.longest_instruction or ""):
            self.longest_instruction = record.instruction
        if (keys := frozenset(row)) not in self._keys:
            self._keys.add(keys)
            self.unread = {**self.rows.unread(row), **self.unread}

    def _add_columns(self, record: Record) -> None:
        """Raises: BadRow: a column that is a number of the query in one row and a list in another."""
        for name, value in record.columns.items():
            kind = kind_of(value)
            if self.kinds.setdefault(name, kind) != kind:
                one, other = ("a list", "one number") if kind == "candidate" else ("one number", "a list")
                raise BadRow(f"column {name!r} has {one} here and {other} in earlier rows; give all rows the same")
            if name not in self.columns and has_number(value):
                self.columns[name] = kind

    def finish(self, name: str) -> dict[str, Any]:
        """What is known of all rows. Raises: ValueError: there is no valid row."""
        if not self.valid:
            first = f"; the first of {len(self.skipped)} bad rows is {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"data.train={name!r} holds no usable row{first}")
        for column, file in self.rows.side.items():
            if len(file) != self.count:
                raise ValueError(
                    f"data.columns.{column}={str(file.path)!r} has {len(file)} lines, and data.train={name!r} "
                    f"{self.count} rows; give one line for each row, in the order of the rows"
                )
        return {
            "skipped": self.skipped,
            "longest_instruction": self.longest_instruction,
            "labelled": bool(self.labelled),
            "columns": self.columns,
            "unread": {name: _example(value) for name, value in self.unread.items()},
        }


def _example(value: Any) -> Any:
    """A value as JSON has it, or its text."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)


def rows_identity(rows: RowParser, schema: Schema, columns: ColumnOption, on_bad_row: OnBadRow) -> dict[str, Any]:
    """All that decides which rows are valid, beside their files."""
    side = [file_identity(file.path) for file in rows.side.values()]
    return {
        "version": VERSION,
        "options": [schema, columns, on_bad_row],
        "side": side,
        "code": code_identity(schema),
    }
