"""Readers of local evaluation files. Each checks every row; errors name the file, the line and the remedy."""

from __future__ import annotations

import csv
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ullme.data.files import is_lines
from ullme.data.jsonl import decode_line, iter_lines, parse_line
from ullme.data.records import BadRow, check_utf8

# Each row with its place, "option: file, line n", for messages.
Rows = list[tuple[str, dict[str, Any]]]


def content_hash(*paths: Path, rules: str = "") -> str:
    """Eight hexadecimal digits that change with the content of the files, and with the rules by which it is scored."""
    digest = hashlib.sha256(rules.encode())
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:8]


def existing_file(path: str | Path, option: str) -> Path:
    """The path, checked. Raises: ValueError: no such file."""
    if not (found := Path(path)).is_file():
        raise ValueError(f"{option}={str(path)!r}: no such file; give the path of an existing file")
    return found


def read_jsonl(path: Path, columns: Sequence[str], option: str) -> Rows:
    """Rows of a JSON-lines file.

    Raises:
        ValueError: an empty file, a line that is not a JSON object, or a missing column.
    """
    rows = []
    for number, _, line in iter_lines(path):
        where = f"{option}: {path}, line {number}"
        try:
            row = parse_line(line)
        except BadRow as reason:
            raise ValueError(f"{where}: {reason}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be a JSON object with {_listed(columns)}")
        rows.append((where, _checked(row, columns, where)))
    return _not_empty(rows, path, option)


def read_table(path: Path, columns: Sequence[str], option: str) -> Rows:
    """Rows of a table: JSON lines, .csv, or else tab-separated, as the rows of pairs that a model is trained on.

    Raises:
        ValueError: see :func:`read_jsonl` and :func:`read_tsv`.
    """
    if is_lines(path):
        return read_jsonl(path, columns, option)
    return read_csv(path, columns, option) if path.suffix.lower() == ".csv" else read_tsv(path, columns, option)


def read_csv(path: Path, columns: Sequence[str], option: str) -> Rows:
    """Rows of a comma-separated file with a header. Raises: ValueError: as for :func:`read_tsv`."""
    csv.field_size_limit(sys.maxsize)
    rows: Rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream)
            header = next(lines, [])
            for cells in lines:
                where = f"{option}: {path}, line {lines.line_num}"
                if len(cells) > len(header):
                    raise ValueError(
                        f"{where} has more cells than the header; put a text with a comma in quotation marks"
                    )
                if cells:
                    rows.append((where, _checked(dict(zip(header, cells, strict=False)), columns, where)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{option}: {path} is no CSV file in UTF-8 ({error}); save it as UTF-8") from None
    return _not_empty(rows, path, option)


def read_tsv(path: Path, columns: Sequence[str], option: str) -> Rows:
    """Rows of a tab-separated file with a header; quotes are ordinary characters.

    Raises:
        ValueError: an empty file, a missing column, or a row with more fields than the header.
    """
    rows: Rows = []
    header: list[str] | None = None
    for number, _, line in iter_lines(path):
        where = f"{option}: {path}, line {number}"
        try:
            fields = decode_line(line).rstrip("\r\n").split("\t")
        except BadRow as reason:
            raise ValueError(f"{where}: {reason}") from None
        if header is None:
            header = fields
            continue
        if len(fields) > len(header):
            raise ValueError(f"{where} has more fields than the header; separate fields with one tab each")
        rows.append((where, _checked(dict(zip(header, fields, strict=False)), columns, where)))
    return _not_empty(rows, path, option)


def texts(row: dict[str, Any], column: str, where: str) -> list[str]:
    """A column that holds a non-empty list of texts.

    Raises:
        ValueError: it holds anything else.
    """
    value = row[column]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: {column!r} must be a list with at least one text, not {value!r:.80}")
    return value


def text(row: dict[str, Any], column: str, where: str) -> str:
    """A column that holds a text. Raises: ValueError: it holds anything else."""
    if not isinstance(value := row[column], str):
        raise ValueError(f"{where}: {column!r} must be a text, not {value!r:.80}")
    return value


def number(row: dict[str, Any], column: str, where: str) -> float:
    """A column that holds a finite number. Raises: ValueError: it holds anything else."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {column!r} must be a number, not {row[column]!r:.80}")
    return value


def _checked(row: dict[str, Any], columns: Sequence[str], where: str) -> dict[str, Any]:
    if missing := [column for column in columns if row.get(column) is None]:
        raise ValueError(f"{where} lacks {_listed(missing)}; every row needs {_listed(columns)}, it has {_listed(row)}")
    for column in columns:
        for value in row[column] if isinstance(row[column], list) else [row[column]]:
            try:
                check_utf8(value if isinstance(value, str) else "", column)
            except BadRow as reason:
                raise ValueError(f"{where}: {reason}") from None
    return row


def _not_empty(rows: Rows, path: Path, option: str) -> Rows:
    if not rows:
        raise ValueError(f"{option}: {path} holds no rows; give a file with at least one")
    return rows


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in names)
