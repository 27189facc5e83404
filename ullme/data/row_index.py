"""An index of checked rows on disk, so that a machine checks the rows of a file once and not at every start.

An entry of the cache (:mod:`ullme.data.row_cache`) is a folder named after the identity of what was checked: the files
(path, size, times and a digest of samples), the schema, the columns and the code that reads rows.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ullme.data import bad_row, columns, jsonl, records
from ullme.data.number_files import Numbers, NumbersWriter
from ullme.data.query_index import fence_of, sorted_hashes, write_sorted_hashes
from ullme.data.row_cache import FACTS, alone, evict, unfinished, use, writable_root
from ullme.utils.dotted_names import named

log = logging.getLogger(__name__)

VERSION = 2
# Bytes of all files together, below which checking the rows is quicker than keeping an index of them.
SMALLEST = 1 << 20
MOST_NEGATIVES = 2**16 - 1  # a row with more is counted as one with so many
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass
class RowIndex:
    """What is known of the valid rows of a source.

    Args:
        positions: (rows,) byte offsets in a file, or numbers of a dataset's rows.
        numbers: (rows,) among all rows, bad ones included; empty where nothing needs them.
        num_negatives: (rows,) uint16.
        facts: what is one for all rows, JSON.
        query_hashes: (rows,) uint32, sorted.
        query_rows: (rows,) the row of each hash.
        query_fence: see :func:`ullme.data.query_index.fence_of`.
        folder: the entry of the cache; None in memory.
    """

    positions: Numbers
    numbers: Numbers
    num_negatives: Numbers
    facts: dict[str, Any]
    query_hashes: Numbers
    query_rows: Numbers
    query_fence: np.ndarray
    folder: Path | None = None


@dataclass
class Writer:
    """Where the checks of a source write to: files of the cache, or memory.

    Args:
        folder: None for memory.
    """

    folder: Path | None = None
    positions: Any = field(init=False)
    numbers: Any = field(init=False)
    num_negatives: Any = field(init=False)
    queries: Any = field(init=False)  # 32-bit hashes

    def __post_init__(self) -> None:
        def numbers(name: str, dtype: type[np.generic]) -> Any:
            return array("q") if self.folder is None else NumbersWriter(self.folder / f"{name}.npy", dtype)

        self.positions, self.numbers = numbers("positions", np.int64), numbers("numbers", np.int64)
        self.num_negatives = numbers("num_negatives", np.uint16)
        self.queries = numbers("queries", np.uint32)

    def close(self, facts: dict[str, Any]) -> None:
        """Complete the files."""
        if self.folder is None:
            return
        for numbers in (self.positions, self.numbers, self.num_negatives, self.queries):
            numbers.close()
        write_sorted_hashes(self.folder / "queries.npy", self.folder)
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        with (self.folder / FACTS).open("w") as file:
            json.dump({"facts": facts, "sizes": sizes}, file)
            file.flush()
            os.fsync(file.fileno())


def cached_index(
    identity: Callable[[], dict[str, Any]],
    build: Callable[[Writer], dict[str, Any]],
    cache_dir: str | None = None,
    unpacks: bool = False,
) -> RowIndex:
    """The index of a source, from the cache if it is there, else built.

    Args:
        identity: of all that the index depends on, JSON; asked again after building.
        build: checks all rows, writes their numbers and returns the facts.
        cache_dir: the folder of the cache, which must be writable; None takes $ULLME_CACHE or ~/.cache/ullme, and where
            that is not writable, warns and keeps the index in memory.
        unpacks: whether ``build`` needs a folder; else the index of files below 1 MiB is made in memory every time.

    Raises:
        ValueError: a folder that was named is not writable, the data changed while they were read, or ``build``'s.
    """
    known = identity()
    small = not unpacks and sum(size for _, size, *_ in known["files"]) < SMALLEST
    root = None if small else writable_root(cache_dir)
    if root is None:
        writer = Writer()
        facts = build(writer)
        _check_same(known, identity())
        counts = np.asarray(writer.num_negatives).clip(max=MOST_NEGATIVES).astype(np.uint16)
        positions, numbers = (Numbers(np.asarray(one)) for one in (writer.positions, writer.numbers))
        hashes, rows = sorted_hashes(np.asarray(writer.queries, dtype=np.uint32))
        queries = Numbers(hashes), Numbers(rows), fence_of(hashes)
        return RowIndex(positions, numbers, Numbers(counts), facts, *queries)
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    folder = root / key
    with alone(folder, ", ".join(str(path) for path, *_ in known["files"][:3])):
        if (found := _load(folder)) is None:
            with unfinished(folder) as place:
                writer = Writer(place)
                facts = build(writer)
                _check_same(known, identity())
                writer.close(facts)
            evict(root, keep=folder)
            found = _load(folder)
        assert found is not None
    return found


def file_identity(path: Path) -> list[Any]:
    """Path, size, times and a digest of samples of a file. Raises: ValueError: it is gone."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = sample_digest(file, status.st_size)
    except OSError as error:
        raise ValueError(
            f"data.train: {path} cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest]


def sample_digest(file: BinaryIO, size: int) -> str:
    """Digest of 16 blocks of 64 KiB, evenly spaced over the first ``size`` bytes; of all of a smaller file."""
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - _SAMPLE_BYTES)
    for i in range(_SAMPLES):
        start = i * _SAMPLE_BYTES if size <= _SAMPLES * _SAMPLE_BYTES else i * last // (_SAMPLES - 1)
        digest.update(os.pread(file.fileno(), max(0, min(_SAMPLE_BYTES, size - start)), start))
    return digest.hexdigest()


def code_identity(schema: str) -> list[str]:
    """Digests of the code that reads a row: another release, or another parser of the user, checks rows anew."""
    modules = [bad_row, columns, jsonl, records]
    files = [module.__file__ for module in modules]
    if "." in schema:
        own = named(schema, "data.schema")
        files.append(inspect.getsourcefile(sys.modules[own.__module__]) or "")
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "" for file in files]


def _load(folder: Path) -> RowIndex | None:
    """A whole entry, which stays as long as it is used; None where there is none. A damaged one is removed."""
    in_use = use(folder)
    try:
        content = json.loads((folder / FACTS).read_text())
        wrong = [name for name, size in content["sizes"].items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, AttributeError):
        wrong = [FACTS]
    if wrong:
        if folder.exists():
            log.warning("data: the index %s is damaged; the rows are checked again", folder)
            shutil.rmtree(folder)
        return None
    os.utime(folder / FACTS)
    names = ("positions", "numbers", "num_negatives", "query_hashes", "query_rows")
    positions, numbers, counts, hashes, rows = (Numbers(folder / f"{name}.npy", in_use) for name in names)
    fence = np.load(folder / "query_fence.npy")
    return RowIndex(positions, numbers, counts, content["facts"], hashes, rows, fence, folder)


def _check_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises: ValueError: a file of rows or of a column has changed. Source code may: the loaded code read the rows."""
    files = [(one, other) for kind in ("files", "side") for one, other in zip(before[kind], after[kind], strict=True)]
    if changed := [str(one[0]) for one, other in files if one != other]:
        raise ValueError(
            f"data.train: {', '.join(changed)} changed while the rows were checked; start again when it is complete"
        )
