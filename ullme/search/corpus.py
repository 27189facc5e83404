"""Read a corpus of documents in one streaming pass: JSONL, a BEIR folder, Parquet, or a dataset of the hub.

:func:`open_corpus` finds the reader, :func:`check_corpus` checks every document before a model is loaded and divides
the corpus into shards, and :meth:`Corpus.read` reads the documents of one shard. None of them holds more than a shard's
documents in memory, besides 8 bytes a document in the check for duplicate ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ullme.data.files import NO_ROWS, SAVED_TO_DISK
from ullme.data.records import BadRow, check_utf8
from ullme.search.corpus_readers import (
    ID_COLUMNS,
    DatasetReader,
    JsonlReader,
    ParquetReader,
    Position,
    Row,
    RowReader,
)
from ullme.utils.progress import progress

OnEmpty = Literal["stop", "keep", "skip"]

# Documents in a shard, and the characters at which it ends earlier, so that long documents take no more memory.
SHARD_ROWS = 16_384
SHARD_CHARACTERS = 32_000_000
MAX_ID_BYTES = 512

_JSONL = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet",)
_COMPRESSED = (".gz", ".bz2", ".zst", ".xz", ".zip")


class Document(NamedTuple):
    """A document of a corpus: its id and its text (title and text, joined by a space)."""

    id: str
    text: str


@dataclass(frozen=True)
class Columns:
    """Which columns of a row make a document.

    Args:
        id: column of the id; "auto" takes the first of _id, id, docid and doc_id that the row has; "none" numbers
            the documents from 0.
        text: columns whose texts are joined by a space; one that a row lacks, or that is null, counts as empty. At
            least the last must be there.
    """

    id: str = "auto"
    text: tuple[str, ...] = ("title", "text")


@dataclass(frozen=True)
class ShardPlan:
    """The documents of a shard: where they begin, and how many there are."""

    start: Position
    rows: int


@dataclass(frozen=True)
class CorpusPlan:
    """A corpus that was checked.

    Args:
        documents: how many there are, over all shards.
        sha256: of all ids and texts, in order.
        shards: consecutive parts of the corpus.
        empty: documents without text that were kept.
        skipped: documents without text that were left out.
    """

    documents: int
    sha256: str
    shards: tuple[ShardPlan, ...]
    empty: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk or on the hub.

    Args:
        name: as the user gave it.
        reader: of its rows.
        columns: that make a document.
        on_empty: what to do with a document without text: ``stop`` refuses it, ``keep`` embeds it as the end token,
            ``skip`` leaves it out.
    """

    name: str
    reader: RowReader
    columns: Columns = field(default_factory=Columns)
    on_empty: OnEmpty = "stop"

    def documents(
        self, start: Position | None = None, number: int = 0, skipped: Callable[[Row], Any] = lambda row: None
    ) -> Iterator[tuple[Row, Document]]:
        """Stream the documents, from the beginning or from a position on.

        Args:
            start: position of the first row.
            number: of the first document, which is its id with ``columns.id="none"``.
            skipped: called with every row that ``on_empty="skip"`` leaves out.

        Raises:
            ValueError: a bad row; the message names file and line.
        """
        for row in self.reader.rows(start):
            try:
                document = _document(row.content, self.columns, number)
            except BadRow as reason:
                raise ValueError(f"{row.where}: {reason}") from None
            if document.text or self.on_empty != "skip":
                yield row, document
                number += 1
            else:
                skipped(row)

    def read(self, shard: ShardPlan, number: int = 0) -> list[Document]:
        """The documents of a shard. ``number`` is that of its first document.

        Raises:
            ValueError: the corpus has changed since it was checked.
        """
        found = [document for _, document in islice(self.documents(shard.start, number), shard.rows)]
        if len(found) < shard.rows:
            raise ValueError(f"--corpus {self.name}: it became shorter while it was read; run the command again")
        return found


def open_corpus(
    name: str,
    *,
    columns: Columns | None = None,
    on_empty: OnEmpty = "stop",
    config: str | None = None,
    split: str | None = None,
) -> Corpus:
    """Open a corpus by name.

    Args:
        name: a .jsonl or .parquet file; a folder with corpus.jsonl (BEIR), or with such files, which are read in the
            order of their names; a dataset of the hub, or a folder of one (also of ``save_to_disk``).
        columns: see :class:`Columns`.
        on_empty: see :class:`Corpus`.
        config: configuration of a dataset.
        split: split of a dataset; None takes its only one.

    Raises:
        ValueError: no such file, files of a kind that is not read, or a dataset that cannot be loaded.
    """
    if on_empty not in get_args(OnEmpty):
        raise ValueError(f"--on_empty {on_empty}: choose {', '.join(get_args(OnEmpty))}")
    columns = columns or Columns()
    if not columns.text:
        raise ValueError("--text_columns is empty; name at least one column")
    return Corpus(name, _reader(name, columns, config, split), columns, on_empty)


def _reader(name: str, columns: Columns, config: str | None, split: str | None) -> RowReader:
    """Raises: ValueError: see :func:`open_corpus`."""
    path = Path(name)
    if not path.exists() and path.suffix.lower() in (*_JSONL, *_PARQUET):
        raise ValueError(f"--corpus {name}: no such file (paths are relative to {Path.cwd()})")
    if not path.exists() or _is_dataset(path):
        return DatasetReader(name, config, split)
    if config is not None or split is not None:
        raise ValueError(
            f"--corpus {name} is a file or folder; --corpus_config and --corpus_split are for datasets of the hub"
        )
    files = _files(path)
    return JsonlReader(files) if files[0].suffix.lower() in _JSONL else ParquetReader(files, columns)


def _is_dataset(path: Path) -> bool:
    """Whether a folder is one of ``save_to_disk``, or has a dataset's files in folders, as on the hub."""
    if not path.is_dir() or (path / "corpus.jsonl").is_file():
        return False
    if any((path / marker).is_file() for marker in SAVED_TO_DISK):
        return True
    below = [p for p in path.rglob("*") if p.suffix.lower() in (*_JSONL, *_PARQUET) and p.name not in NO_ROWS]
    return bool(below) and all(p.parent != path for p in below)


def _files(path: Path) -> list[Path]:
    """The files of a corpus. Raises: ValueError: there are none, or of several kinds."""
    if path.is_file():
        files = [path]
        if path.suffix.lower() in _COMPRESSED:
            raise ValueError(f"--corpus {path} is compressed, and documents are read from the middle; unpack it first")
    elif (path / "corpus.jsonl").is_file():
        files = [path / "corpus.jsonl"]
    else:
        there = [p for p in sorted(path.iterdir()) if p.is_file() and p.name not in NO_ROWS]
        files = [p for p in there if p.suffix.lower() in (*_JSONL, *_PARQUET)]
        if others := [p.name for p in there if p.suffix.lower() in _COMPRESSED]:
            raise ValueError(f"--corpus {path}: {others[0]} is compressed; unpack it first")
    kinds = {"Parquet" if p.suffix.lower() in _PARQUET else "JSONL" for p in files}
    if not files or (path.is_file() and path.suffix.lower() not in (*_JSONL, *_PARQUET)):
        raise ValueError(
            f"--corpus {path}: neither corpus.jsonl nor other .jsonl or .parquet files; give a JSON line of _id and "
            "text for each document"
        )
    if len(kinds) > 1:
        raise ValueError(f"--corpus {path} holds JSONL and Parquet files; name a folder with one kind of them")
    return files


def _document(row: Any, columns: Columns, number: int) -> Document:
    """A row's document. Raises: BadRow: a missing or unusable id or text."""
    texts = column_texts(row, columns)
    return Document(_id(row, columns.id, number), " ".join(text for text in texts if text))


def column_texts(row: Any, columns: Columns) -> list[str]:
    """The stripped text of each of ``columns.text`` in a raw row. Raises: BadRow: a missing or unusable text."""
    if not isinstance(row, dict):
        raise BadRow(f"the row is a {type(row).__name__}, not an object with keys")
    last = columns.text[-1]
    if last not in row:
        raise BadRow(f"there is no column {last!r} among {sorted(row)}; name the text's with --text_columns")
    texts = []
    for name in columns.text:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise BadRow(f"{name!r} must be a text, not {type(value).__name__}")
        check_utf8(value or "", name)
        texts.append((value or "").strip())
    return texts


def _id(row: dict[str, Any], column: str, number: int) -> str:
    if column == "none":
        return str(number)
    names = [name for name in (ID_COLUMNS if column == "auto" else (column,)) if name in row]
    if not names:
        wanted = " or ".join(ID_COLUMNS) if column == "auto" else column
        raise BadRow(
            f"there is no id ({wanted}) among {sorted(row)}; name its column with --id_column, or number the documents "
            "with --id_column none"
        )
    value = row[names[0]]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"{names[0]!r} must be a text or a whole number, not {type(value).__name__}")
    check_utf8(key := str(value), names[0])
    if not key or any(ord(c) < 32 or c in "\x7f\x85\u2028\u2029" for c in key):
        what = "is empty" if not key else "holds a tab, a line break or another control character"
        raise BadRow(f"{names[0]} {key[:80]!r} {what}, which no file of results can hold; give it another id")
    if len(key.encode()) > MAX_ID_BYTES:
        raise BadRow(f"{names[0]} {key[:80]!r} has more than {MAX_ID_BYTES} bytes; give it a shorter one")
    return key


def check_corpus(corpus: Corpus, shard_rows: int = SHARD_ROWS, shard_characters: int = SHARD_CHARACTERS) -> CorpusPlan:
    """Check every document and divide the corpus into shards.

    Args:
        corpus: to check.
        shard_rows: documents in a shard; the last has fewer.
        shard_characters: a shard ends before the document with which it would have more.

    Raises:
        ValueError: a bad row, an empty document with ``on_empty="stop"``, a duplicate id, or no document.
    """
    if shard_rows < 1:
        raise ValueError(f"--shard_rows {shard_rows} must be at least 1")
    digest = hashlib.sha256()
    hashes = _Hashes()
    shards: list[ShardPlan] = []
    start, rows, characters, empty, skipped = None, 0, 0, 0, 0

    def skip(_: Row) -> None:
        nonlocal skipped
        skipped += 1

    with progress(f"checking {corpus.name}", unit="document") as bar:
        for row, (key, text) in corpus.documents(skipped=skip):
            if not text:
                empty += 1
                if corpus.on_empty == "stop":
                    raise ValueError(
                        f"{row.where}: document {key!r} has no text; give it one, or --on_empty skip to leave such "
                        "documents out, or --on_empty keep to embed them"
                    )
            if start is not None and (rows == shard_rows or characters + len(text) > shard_characters):
                shards.append(ShardPlan(start, rows))
                start, rows, characters = None, 0, 0
            if start is None:
                start = row.position
            rows, characters = rows + 1, characters + len(text)
            one = f"{key}\0{text}\0".encode()
            digest.update(one)
            hashes.add(key)
            bar.update()
    if start is None:
        with_text = " with a text" if corpus.on_empty == "skip" else ""
        raise ValueError(f"--corpus {corpus.name} holds no document{with_text}")
    shards.append(ShardPlan(start, rows))
    if (repeated := hashes.repeated()) is not None:
        _report_duplicate(corpus, repeated)
    return CorpusPlan(sum(shard.rows for shard in shards), digest.hexdigest(), tuple(shards), empty, skipped)


class _Hashes:
    """Finds equal ids by 64-bit hashes of them: 8 bytes an id, where a set would take a hundred."""

    def __init__(self) -> None:
        self._values = np.empty(1024, dtype=np.uint64)
        self._size = 0

    def add(self, key: str) -> None:
        if self._size == len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
        self._values[self._size] = _hash(key)
        self._size += 1

    def repeated(self) -> np.ndarray | None:
        """The hashes that came more than once; None if there are none."""
        values = self._values[: self._size]
        values.sort()
        twice = values[1:][values[1:] == values[:-1]]
        return np.unique(twice) if len(twice) else None


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _report_duplicate(corpus: Corpus, repeated: np.ndarray) -> None:
    """Raises: ValueError: two documents have the same id (not only the same hash)."""
    suspects = {int(value) for value in repeated}
    first: dict[str, str] = {}
    for row, (key, _) in corpus.documents():
        if _hash(key) in suspects:
            if key in first:
                raise ValueError(f"{row.where}: duplicate id {key!r}, first at {first[key]}; ids must be unique")
            first[key] = row.where
