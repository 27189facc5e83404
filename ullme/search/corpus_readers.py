"""Raw rows of a corpus, from the beginning or from the middle: JSONL and Parquet files, and datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ullme.data.files import SAVED_TO_DISK
from ullme.data.jsonl import BOM_UTF8, parse_line
from ullme.data.records import BadRow

if TYPE_CHECKING:
    from ullme.search.corpus import Columns

ID_COLUMNS = ("_id", "id", "docid", "doc_id")
_BATCH_ROWS = 1024


class Position(NamedTuple):
    """Where a row begins: number of the file, byte offset (JSONL) or row (Parquet, hub) in it, and line from 1."""

    file: int
    offset: int
    line: int


class Row(NamedTuple):
    """A raw row with its position, and the file and line for messages."""

    position: Position
    where: str
    content: Any


class RowReader(Protocol):
    """Reads raw rows, from the beginning or from a row's position on."""

    def rows(self, start: Position | None = None) -> Iterator[Row]: ...


class JsonlReader:
    """Rows of JSONL files, one after the other; blank lines are skipped."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        begin = start or Position(0, 0, 1)
        for number in range(begin.file, len(self.files)):
            path = self.files[number]
            offset, line = (begin.offset, begin.line) if number == begin.file else (0, 1)
            with path.open("rb") as file:
                file.seek(offset)
                for raw in file:
                    position, where = Position(number, offset, line), f"{path}:{line}"
                    offset, line = offset + len(raw), line + 1
                    text = raw.removeprefix(BOM_UTF8) if position.offset == 0 else raw
                    if text.strip():
                        try:
                            yield Row(position, where, parse_line(text))
                        except BadRow as reason:
                            raise ValueError(f"{where}: {reason}") from None


class ParquetReader:
    """Rows of Parquet files; only the row groups and columns that are needed are read."""

    def __init__(self, files: Sequence[Path], columns: Columns) -> None:
        self.files = list(files)
        self.wanted = {*columns.text, *(ID_COLUMNS if columns.id == "auto" else (columns.id,))}

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        begin = start or Position(0, 0, 1)
        for number in range(begin.file, len(self.files)):
            yield from self._rows_of(number, begin.offset if number == begin.file else 0)

    def _rows_of(self, number: int, first: int) -> Iterator[Row]:
        import pyarrow
        from pyarrow import parquet

        path = self.files[number]
        try:
            with parquet.ParquetFile(path) as file:
                columns = [name for name in file.schema_arrow.names if name in self.wanted]
                sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
                ends = np.cumsum(sizes, dtype=np.int64)
                group = int(np.searchsorted(ends, first, side="right"))
                row = int(ends[group - 1]) if group else 0
                groups = list(range(group, file.num_row_groups))
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns):
                    for content in batch.to_pylist() if row + len(batch) > first else [None] * len(batch):
                        if row >= first:
                            yield Row(Position(number, row, row + 1), f"{path} row {row + 1}", content)
                        row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as Parquet ({error}); is it whole?") from None


class DatasetReader:
    """Rows of a dataset, read from the Arrow files of the datasets library.

    Args:
        name: of the hub, or a folder: of ``save_to_disk``, or with a dataset's files as they are on the hub.
        config: its configuration, if it has several.
        split: likewise.

    Raises:
        ValueError: it cannot be loaded, or has several splits and none was named.
    """

    def __init__(self, name: str, config: str | None, split: str | None) -> None:
        from datasets import DatasetDict
        from datasets.exceptions import DatasetsError

        self.name = name
        try:
            found = _load(name, config, split)
        except (FileNotFoundError, ConnectionError, ValueError, RuntimeError, DatasetsError) as error:
            what = "a folder without" if Path(name).exists() else "no such file or folder, and not"
            raise ValueError(
                f"--corpus {name} (--corpus_config {config}, --corpus_split {split}): {what} a dataset that can be "
                f"loaded ({error}); give a JSON line of _id and text for each document"
            ) from error
        if isinstance(found, DatasetDict):
            if split is None and len(found) > 1:
                raise ValueError(f"--corpus {name} has the splits {', '.join(found)}; choose one with --corpus_split")
            if split is not None and split not in found:
                raise ValueError(f"--corpus {name} has the splits {', '.join(found)}, and no --corpus_split {split}")
            found = found[split or next(iter(found))]
        self.dataset: Any = found
        self._arguments = str(Path(name).absolute()) if Path(name).exists() else name, config, split

    def __reduce__(self) -> tuple[Any, ...]:
        """Another machine loads the dataset into its own cache."""
        return DatasetReader, self._arguments

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        row = start.offset if start else 0
        while row < len(self.dataset):
            batch = self.dataset[row : row + _BATCH_ROWS]
            for values in zip(*batch.values(), strict=True):
                content = dict(zip(batch, values, strict=True))
                yield Row(Position(0, row, row + 1), f"{self.name} row {row + 1}", content)
                row += 1


def _load(name: str, config: str | None, split: str | None) -> Any:
    """A dataset, or its splits."""
    from datasets import load_dataset, load_from_disk

    if any((Path(name) / marker).exists() for marker in SAVED_TO_DISK):
        return load_from_disk(name)
    return load_dataset(name, config, split=split)
