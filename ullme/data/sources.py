"""Row sources: JSONL files, and everything that ``datasets.load_dataset`` reads.

A source checks all its rows when it is created, so that a bad row stops the run before a model is loaded. It does not
keep the texts in memory, and is cheap to pickle for dataloader workers.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ullme.data.checked_lines import CheckedLines
from ullme.data.checked_rows import CheckedRows, OnBadRow, RowParser, query_hash, rows_identity
from ullme.data.columns import ColumnKind, ColumnOption
from ullme.data.files import check_config, check_kind, expand_files, is_jsonl, is_table
from ullme.data.jsonl import COMPRESSIONS, iter_lines
from ullme.data.number_files import Numbers
from ullme.data.order import ORDER_VERSION, Order, random_order
from ullme.data.query_index import QueryIndex
from ullme.data.records import BadRow, Record, Schema
from ullme.data.row_index import (
    Writer,
    cached_index,
    file_identity,
)
from ullme.data.tables import load
from ullme.utils.progress import progress

# Rows of a random order that are computed at once.
_BLOCK = 1 << 20

log = logging.getLogger(__name__)


class RowSource(Protocol):
    """The type of a sequence of training rows.

    Attributes:
        skipped: "file:line: reason" of every bad row that was skipped.
        longest_instruction: the longest instruction of a row, or None if no row has one.
        labelled: whether rows say which text is a positive; in one source all do, or none.
        columns: name -> kind of every column of numbers that some row has a number in.
        unread: field -> an example of its value, for every field of the rows that nothing reads.
    """

    skipped: list[str]
    longest_instruction: str | None
    labelled: bool
    columns: dict[str, ColumnKind]
    unread: dict[str, Any]

    @property
    def num_negatives(self) -> Numbers | np.ndarray:
        """(rows,) number of hard negatives of each row, 65,535 at most."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Record: ...

    def positives_of(self, query: str) -> set[str]:
        """What is a positive of a row with this query; without labels, what is a candidate."""
        ...

    def count_of(self, query: str) -> int:
        """At most how many rows have this query; found without reading any."""
        ...


def _positives(source: RowSource, rows: Iterable[int], query: str) -> set[str]:
    """The positives of those of the rows that have a query; without labels, the candidates."""
    records = [source[row] for row in rows]
    return {text for r in records if r.query == query for text in r.positives or r.negatives}


class JsonlSource:
    """Rows of JSONL files, read from disk on access.

    Args:
        files: files, patterns such as ``train-*.jsonl``, or folders. Of a folder, all .jsonl and .json files are read,
            or only those named after ``split`` (train.jsonl, train-00001.jsonl), if there are any.
        schema: the columns, see :func:`ullme.data.records.parse_record`.
        on_bad_row: ``stop`` raises at the first bad row, ``skip`` leaves it out and records it in ``skipped``.
        split: see ``files``.
        columns: columns of numbers, see :data:`ullme.data.columns.ColumnOption`.
        cache_dir: of the index of checked rows, see :func:`ullme.data.row_index.cached_index`.

    Raises:
        ValueError: no such file, a bad row ("file:line: reason"), or no usable row.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        schema: Schema = "auto",
        on_bad_row: OnBadRow = "stop",
        split: str = "train",
        columns: ColumnOption = None,
        cache_dir: str | None = None,
    ) -> None:
        specs = [files] if isinstance(files, str) else list(files)
        self.files = [path for name in specs for path in expand_files(name, split)]
        self._parser = RowParser(schema, columns, cache_dir)
        identities: list[list[Any]] = []

        def identity() -> dict[str, Any]:
            identities[:] = [file_identity(path) for path in self.files]
            return {"files": list(identities), **rows_identity(self._parser, schema, columns, on_bad_row)}

        def build(writer: Writer) -> dict[str, Any]:
            return self._build(CheckedRows(self._parser, on_bad_row, writer), ", ".join(specs))

        packed = any(path.suffix.lower() in COMPRESSIONS for path in self.files)
        index = cached_index(identity, build, cache_dir, packed)
        self._ends: list[int] = index.facts["ends"]
        self._offsets, self._numbers, self.num_negatives = index.positions, index.numbers, index.num_negatives
        self.skipped, self.longest_instruction = index.facts["skipped"], index.facts["longest_instruction"]
        self.labelled, self.columns, self.unread = (index.facts[name] for name in ("labelled", "columns", "unread"))
        self._queries = QueryIndex(index.query_hashes, index.query_rows, index.query_fence)
        unpacked = [self._unpacked_file(index.folder, n) for n in range(len(self.files))]
        self._lines = CheckedLines(
            [copy or path for copy, path in zip(unpacked, self.files, strict=True)],
            [None if copy else known for copy, known in zip(unpacked, identities, strict=True)],
        )
        if empty := [
            str(path) for n, path in enumerate(self.files) if self._ends[n] == (self._ends[n - 1] if n else 0)
        ]:
            log.warning("data: %d of %d files hold no row: %s", len(empty), len(self.files), ", ".join(empty[:3]))

    def _build(self, checked: CheckedRows, name: str) -> dict[str, Any]:
        """Check all rows; compressed files are unpacked beside the index, for access to single rows."""
        ends = []
        for n, path in enumerate(self.files):
            with ExitStack() as stack:
                copy = None
                if path.suffix.lower() in COMPRESSIONS:
                    if checked.writer.folder is None:
                        raise ValueError(
                            f"data.train: {path} is compressed and must be unpacked to the cache, which is not "
                            "writable; set data.cache_dir to a folder with room for it"
                        )
                    copy = stack.enter_context(self._unpacked_name(checked.writer.folder, n).open("wb"))
                for number, offset, line in iter_lines(path, copy):
                    checked.add(offset, f"{path}:{number}", line)
            ends.append(checked.valid)
        return {"ends": ends, **checked.finish(name)}

    @staticmethod
    def _unpacked_name(folder: Path, number: int) -> Path:
        return folder / f"unpacked{number}.jsonl"

    def _unpacked_file(self, folder: Path | None, number: int) -> Path | None:
        """Where the lines of a compressed file are; None for others."""
        if folder is None or self.files[number].suffix.lower() not in COMPRESSIONS:
            return None
        return self._unpacked_name(folder, number)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        file = bisect_right(self._ends, row)
        line = self._lines.read(file, self._offsets[row])
        try:
            return self._parser.parse(line, self._numbers[row] if len(self._numbers) else row)
        except BadRow:  # it was valid
            self._lines.check(file)
            self._parser.check_side_files()
            raise

    def positives_of(self, query: str) -> set[str]:
        return _positives(self, self._queries.rows(query_hash(query)), query)

    def count_of(self, query: str) -> int:
        return self._queries.count(query_hash(query))


class HubSource:
    """Rows of a dataset on the hub, of a local dataset folder, of a ``save_to_disk`` folder or of table files.

    Args:
        path: hub name, folder, or .parquet, .arrow or .csv files.
        name: configuration of the dataset, if it has several.
        split: split of the dataset.
        schema: the columns, see :func:`ullme.data.records.parse_record`.
        on_bad_row: as in :class:`JsonlSource`; messages call rows "path[split] row i".
        columns: as in :class:`JsonlSource`.
        cache_dir: likewise.

    Raises:
        ValueError: it cannot be loaded, a bad row, or no usable row.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        name: str | None = None,
        split: str = "train",
        schema: Schema = "auto",
        on_bad_row: OnBadRow = "stop",
        columns: ColumnOption = None,
        cache_dir: str | None = None,
    ) -> None:
        self._parser = RowParser(schema, columns, cache_dir)
        self.dataset = load(path, name, split, cache_dir)
        files = [Path(file["filename"]) for file in self.dataset.cache_files]

        def identity() -> dict[str, Any]:
            known = rows_identity(self._parser, schema, columns, on_bad_row)
            rows = [len(self.dataset), str(self.dataset._fingerprint), path, split]
            return {"files": [file_identity(file) for file in files], "dataset": rows, **known}

        def build(writer: Writer) -> dict[str, Any]:
            checked = CheckedRows(self._parser, on_bad_row, writer)
            for i, row in enumerate(progress(f"checking {path}", self.dataset, unit="row")):
                checked.add(i, f"{path}[{split}] row {i}", row)
            return checked.finish(f"{path}[{split}]")

        index = cached_index(identity, build, cache_dir)
        self._rows, self.num_negatives = index.positions, index.num_negatives
        self.skipped, self.longest_instruction = index.facts["skipped"], index.facts["longest_instruction"]
        self.labelled, self.columns, self.unread = (index.facts[name] for name in ("labelled", "columns", "unread"))
        self._queries = QueryIndex(index.query_hashes, index.query_rows, index.query_fence)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(self._rows[row])
        return self._parser.parse(self.dataset[number], number)

    def positives_of(self, query: str) -> set[str]:
        return _positives(self, self._queries.rows(query_hash(query)), query)

    def count_of(self, query: str) -> int:
        return self._queries.count(query_hash(query))


class FirstRows:
    """The first rows of a random order of another source.

    Args:
        source: the other source.
        order: of all its rows.
        count: how many are kept.
    """

    def __init__(self, source: RowSource, order: Order, count: int) -> None:
        self.source, self.order, self.count = source, order, count
        self.skipped, self.longest_instruction = source.skipped, source.longest_instruction
        self.labelled, self.columns, self.unread = source.labelled, source.columns, source.unread

    @property
    def num_negatives(self) -> np.ndarray:
        """(rows,) a copy, which is not kept."""
        blocks = (np.arange(start, min(start + _BLOCK, self.count)) for start in range(0, self.count, _BLOCK))
        return np.concatenate([self.source.num_negatives[self.order.at(block)] for block in blocks])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < self.count:
            raise IndexError(f"row {row} of {self.count}")
        return self.source[self.order[row]]

    def positives_of(self, query: str) -> set[str]:
        return self.source.positives_of(query)  # those of the other rows are positives all the same

    def count_of(self, query: str) -> int:
        return self.source.count_of(query)


class Subset:
    """A subset of the rows of another source.

    Args:
        source: the other source.
        rows: (rows,) indices of its rows; kept in 4 bytes each where there are fewer than 2^32.
    """

    def __init__(self, source: RowSource, rows: np.ndarray) -> None:
        self.source = source
        self.rows = rows.astype(np.uint32) if len(source) < 2**32 else rows
        self.skipped, self.longest_instruction = source.skipped, source.longest_instruction
        self.labelled, self.columns, self.unread = source.labelled, source.columns, source.unread

    @property
    def num_negatives(self) -> np.ndarray:
        """(rows,) a copy, which is not kept."""
        return self.source.num_negatives[self.rows.astype(np.int64)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Record:
        return self.source[int(self.rows[row])]

    def positives_of(self, query: str) -> set[str]:
        return self.source.positives_of(query)  # those of rows outside the subset are positives all the same

    def count_of(self, query: str) -> int:
        return self.source.count_of(query)


def open_source(
    spec: str | Sequence[str],
    *,
    name: str | None = None,
    split: str = "train",
    schema: Schema = "auto",
    on_bad_row: OnBadRow = "stop",
    max_rows: int | None = None,
    seed: int = 42,
    order_version: int = ORDER_VERSION,
    columns: ColumnOption = None,
    cache_dir: str | None = None,
) -> RowSource:
    """Open training rows by the value of ``data.train``.

    Args:
        spec: .jsonl or .json files, patterns or folders with such files (one or a list), or what
            :class:`HubSource` takes.
        name: configuration of a hub dataset.
        split: split of the dataset.
        schema: the columns, see :func:`ullme.data.records.parse_record`.
        on_bad_row: ``stop`` or ``skip``, see :class:`JsonlSource`.
        max_rows: keep this many rows, the first after a shuffle with ``seed``; None keeps all.
        seed: of that shuffle.
        order_version: of that shuffle, see :data:`ullme.data.order.ORDER_VERSION`.
        columns: columns of numbers, see :data:`ullme.data.columns.ColumnOption`.
        cache_dir: of the index of checked rows, see :func:`ullme.data.row_index.cached_index`.

    Raises:
        ValueError: no such file, several datasets, a bad row, or no usable row.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if not specs:
        raise ValueError("data.train is empty; name a file, a folder or a dataset")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"data.max_rows={max_rows} must be at least 1; leave it out to use every row")
    source: RowSource
    for one in specs:
        check_kind(one, split)
    check_config(specs, name)
    if all(map(is_jsonl, specs)):
        source = JsonlSource(specs, schema, on_bad_row, split, columns, cache_dir)
    elif len(specs) == 1 or all(map(is_table, specs)):
        source = HubSource(specs[0] if len(specs) == 1 else specs, name, split, schema, on_bad_row, columns, cache_dir)
    else:
        raise ValueError(f"data.train={specs}: a list must hold JSONL files or table files only; name one dataset")
    if max_rows is None or max_rows >= len(source):
        return source
    return FirstRows(source, random_order(len(source), [seed], order_version), max_rows)
