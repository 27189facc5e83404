"""How many training rows an epoch has, counted without parsing them, and how many passages a query has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def epoch_rows(data: Any) -> int:
    """Rows of an epoch: those of ``data.train``, or of each of ``data.datasets`` times its weight.

    Args:
        data: the options under ``data:``.

    Raises:
        ValueError: rows of a dataset that cannot be counted, and no ``max_rows`` says how many they are.
    """
    if data.datasets is None:
        return _rows(data.train, data.train_split, data.max_rows)
    return round(sum(one.weight * _rows(one.train, one.split, one.max_rows) for one in data.datasets))


def most_passages(data: Any) -> tuple[int, int]:
    """The hard negatives and positives of a query, of the dataset in which these are the most together.

    Args:
        data: the options under ``data:``, or a data module that may lack them.
    """
    negatives, positives = getattr(data, "num_hard_negatives", 8), getattr(data, "num_positives", 1)
    own = [
        (
            negatives if one.num_hard_negatives is None else one.num_hard_negatives,
            positives if one.num_positives is None else one.num_positives,
        )
        for one in getattr(data, "datasets", None) or []
    ]
    return max(own or [(negatives, positives)], key=sum)


def _rows(train: str | Sequence[str], split: str, max_rows: int | None) -> int:
    """Raises: ValueError: see :func:`epoch_rows`."""
    from ullme.data.files import expand_files

    names = [train] if isinstance(train, str) else train
    try:
        files = [path for name in names for path in expand_files(name, split)]
    except ValueError as error:
        if max_rows is not None:
            return max_rows
        raise ValueError(f"data.train={train!r} is not a local file, so its size is unknown; pass --rows=N") from error
    count = sum(_rows_of_file(path) for path in files)
    return count if max_rows is None else min(max_rows, count)


def _rows_of_file(path: Path) -> int:
    from ullme.data.files import is_lines
    from ullme.data.jsonl import iter_lines

    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(path).num_rows
    if path.suffix.lower() == ".arrow":
        from datasets import Dataset

        return len(Dataset.from_file(str(path)))
    lines = sum(1 for _ in iter_lines(path))
    # in a table without line breaks in its cells, one line is the header
    return lines if is_lines(path) or path.suffix.lower() == ".txt" else max(0, lines - 1)
