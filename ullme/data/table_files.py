"""Table files checked before ``datasets`` reads them, which loses or shifts what does not fit."""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ullme.data.files import TABLES, suffix
from ullme.data.row_index import VERSION, cached_index, file_identity

log = logging.getLogger(__name__)

# An empty cell of a CSV file has no value; the words None, NA and null are texts as any other.
CELLS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}

# Delimiter -> what to do about a row with too many cells.
_TOO_MANY = {",": "put texts that hold a comma in quotation marks", "\t": "remove a tab"}


class TableError(ValueError):
    """Something is wrong with a file; the message names it."""


def reading(names: Sequence[str], cache_dir: str | None = None) -> tuple[str, list[str], dict[str, Any]]:
    """How to read table files with ``load_dataset``.

    Args:
        names: files or patterns of one kind.
        cache_dir: keeps what was found in large CSV files, see :func:`ullme.data.row_index.cached_index`.

    Returns:
        The kind as ``datasets`` calls it, the files, and options of ``load_dataset``: every cell of a CSV or TSV file
        is a text, and Parquet files have the columns that any of them has.

    Raises:
        TableError: files of several kinds, or whose columns do not go together; a row of a CSV file that has more
            cells than the header; or a file that is no CSV or Parquet.
        FileNotFoundError: no such file.
    """
    files = [file for name in names for file in _matching(name)]
    kinds = {suffix(file) for file in files}
    if len(kinds) > 1:
        raise TableError(
            f"{', '.join(names)} are files of several kinds ({', '.join(sorted(kinds))}); give each kind an entry of "
            "data.datasets of its own"
        )
    kind = kinds.pop()
    if TABLES[kind] == "csv":
        return "csv", files, _csv_options(files, kind, cache_dir)
    if TABLES[kind] == "parquet":
        return _reading_parquet(files)
    return TABLES[kind], files, {}


def files_of(builder: Any, split: str) -> list[str]:
    """The local files that a builder of ``datasets`` would read for a split; none where its own options differ."""
    config = builder.config
    files = list((config.data_files or {}).get(split, []))
    if any(suffix(file) not in TABLES for file in files) or getattr(config, "skiprows", None):
        return []
    separators = {"\t" if suffix(file) == ".tsv" else "," for file in files}
    return files if getattr(config, "sep", None) in (None, *separators) else []


def _matching(name: str) -> list[str]:
    found = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
    if not found:
        raise FileNotFoundError(f"no such file: {name}")
    return found


def _csv_options(files: Sequence[str], kind: str, cache_dir: str | None) -> dict[str, Any]:
    from datasets import Features, Value

    # Quotation marks of a TSV file are ordinary characters, as in the STS files of evaluation.
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
    dialect = options.get("sep", ","), options.get("quoting", csv.QUOTE_MINIMAL)
    headers = [_header(file, *dialect, cache_dir) for file in files]
    for file, header in zip(files, headers, strict=True):
        if set(header) != set(headers[0]):
            raise TableError(
                f"{file} has the columns {', '.join(header)}, and {files[0]} has {', '.join(headers[0])}; give each an "
                "entry of data.datasets of its own, or all the same columns"
            )
    return {**options, **CELLS, "features": Features({column: Value("string") for column in headers[0]})}


def _header(file: str, delimiter: str, quoting: Any, cache_dir: str | None) -> list[str]:
    """As :func:`_checked_header`, which reads all of a file, once for a machine."""

    def identity() -> dict[str, Any]:
        what = ["CSV", delimiter, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
        return {"version": VERSION, "files": [file_identity(Path(file))], "side": [], "what": what}

    checked = cached_index(identity, lambda _: {"header": _checked_header(file, delimiter, quoting)}, cache_dir)
    return checked.facts["header"]


def _checked_header(file: str, delimiter: str, quoting: Any) -> list[str]:
    """The columns of a CSV file, of which every row has been looked at: pandas takes the first cell of a row that is
    too long for a name of the row, so that every other cell stands in the column before its own."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, delimiter=delimiter, quoting=quoting)
            header = next(rows, [])
            _check_header(file, header)
            for row in rows:
                if len(row) > len(header):
                    raise TableError(
                        f"{file}:{rows.line_num}: the row has {len(row)} cells and the header {len(header)}; "
                        f"{_TOO_MANY[delimiter]}"
                    )
    except UnicodeDecodeError as error:
        raise TableError(
            f"{file} is not UTF-8 ({error.reason} {error.object[error.start]:#x}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise TableError(f"{file}:{rows.line_num}: {error}; is it a CSV file?") from None
    # pandas calls a column without a name, such as its own to_csv writes for the index, like this
    return [name or f"Unnamed: {n}" for n, name in enumerate(header)]


def _check_header(file: str, header: list[str]) -> None:
    if not header:
        raise TableError(f"{file} is empty; its first line must name the columns")
    if twice := sorted({name for name in header if header.count(name) > 1 and name}):
        raise TableError(f"{file}: the column {twice[0]!r} stands twice in the header; rename one of them")


def _reading_parquet(files: Sequence[str]) -> tuple[str, list[str], dict[str, Any]]:
    """As :func:`reading`, without files that hold no row, which ``datasets`` cannot read.

    Where files differ, rows have all columns that any of them has, and null in those that their own file lacks.
    """
    import pyarrow
    from datasets import Features
    from pyarrow import parquet

    found = {}
    for file in files:
        try:
            metadata = parquet.read_metadata(file)
            found[file] = metadata.num_rows, metadata.schema.to_arrow_schema().remove_metadata()
        except pyarrow.ArrowException as error:
            raise TableError(f"{file} cannot be read as Parquet ({error}); is it whole?") from None
    if empty := [file for file, (rows, _) in found.items() if not rows]:
        if len(empty) == len(found):
            raise TableError(f"{', '.join(empty[:3])} holds no row")
        log.warning("data: %d of %d files hold no row: %s", len(empty), len(found), ", ".join(empty[:3]))
    full = [file for file in files if file not in empty]
    schemas = [found[file][1] for file in full]
    if all(schema == schemas[0] for schema in schemas):
        return "parquet", full, {}
    try:
        features = Features.from_arrow_schema(pyarrow.unify_schemas(schemas, promote_options="permissive"))
    except pyarrow.ArrowException as error:
        raise TableError(
            f"{', '.join(full[:3])}: a column has values of different kinds ({error}); give each file an entry of "
            "data.datasets of its own"
        ) from None
    return "parquet", full, {"features": features}
