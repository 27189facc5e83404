"""What negatives are mined for: training rows with their positives, or queries that nobody has labelled."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ullme.data.records import Record
from ullme.data.sources import OnBadRow, RowSource, open_source
from ullme.mining.text_hashes import text_hash
from ullme.utils.progress import progress


class MiningRow(NamedTuple):
    """A query to mine for.

    Args:
        query: its text.
        positives: of this row.
        known: sorted, the positives of all rows with this query.
        instruction: the row's own; None for the model's.
        id: of the query; None for a row, which has none.
    """

    query: str
    positives: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    instruction: str | None = None
    id: str | None = None


class MiningRows(Protocol):
    """Rows to mine for.

    Attributes:
        name: as the user gave it.
        labelled: whether they have positives.
        most_positives: of the query that has most, over all rows; 0 without labels.
        positive_hashes: (n,) uint64 of all positives.
        digest: SHA-256 of all that is read of them.
    """

    name: str
    labelled: bool
    most_positives: int
    positive_hashes: np.ndarray
    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> MiningRow: ...


class LabelledRows:
    """Training rows. 16 bytes a positive and what the source keeps are held in memory.

    Args:
        source: the rows.
        name: as the user gave it.

    Raises:
        ValueError: the rows have no positives.
    """

    labelled = True

    def __init__(self, source: RowSource, name: str) -> None:
        if not source.labelled:
            raise ValueError(
                f"--rows {name}: the rows have no positives; give the queries as --queries, JSON lines of _id and text"
            )
        self.source, self.name = source, name
        self._known = lru_cache(1024)(lambda query: tuple(sorted(source.positives_of(query))))
        queries, positives, digest = array("Q"), array("Q"), hashlib.sha256()
        for number in progress(f"reading {name}", range(len(source)), unit="row"):
            record: Record = source[number]
            content = [record.query, record.positives, record.instruction]
            digest.update(json.dumps(content).encode())
            queries.extend([text_hash(record.query)] * len(record.positives))
            positives.extend(map(text_hash, record.positives))
        pairs = np.stack([np.asarray(queries), np.asarray(positives)], axis=1)
        _, counts = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
        self.most_positives = int(counts.max())
        self.positive_hashes = np.unique(pairs[:, 1])
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> MiningRow:
        record = self.source[number]
        return MiningRow(record.query, record.positives, self._known(record.query), record.instruction)


class UnlabelledQueries:
    """Queries without positives.

    Args:
        queries: id -> text, such as :func:`~ullme.search.queries.read_queries` gives.
        name: as the user gave it.
    """

    labelled, most_positives = False, 0
    positive_hashes = np.empty(0, dtype=np.uint64)

    def __init__(self, queries: Mapping[str, str], name: str) -> None:
        self.name = name
        self._queries = list(queries.items())
        self.digest = hashlib.sha256(json.dumps(self._queries).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, number: int) -> MiningRow:
        key, text = self._queries[number]
        return MiningRow(text, id=key)


def open_rows(files: Sequence[str], schema: str = "auto", on_bad_row: OnBadRow = "stop") -> LabelledRows:
    """Open training rows.

    Args:
        files: as for ``data.train``.
        schema: as for ``data.schema``.
        on_bad_row: as for ``data.on_bad_row``.

    Raises:
        ValueError: no such file, a bad row ("file:line: reason"), no usable row, or rows without positives.
    """
    name = ", ".join(files)
    try:
        source = open_source(list(files), schema=schema, on_bad_row=on_bad_row)
    except ValueError as error:
        # the reader names the options of training
        text = str(error).replace("data.train=", "--rows ").replace("data.train", "--rows")
        text = text.replace("data.on_bad_row=skip", "--on_bad_row skip").replace("data.schema=", "--schema ")
        raise ValueError(text) from None
    return LabelledRows(source, name)
