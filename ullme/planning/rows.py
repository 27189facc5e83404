"""How many training rows an epoch has, counted without parsing them, and how many passages a query has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DatasetShare:
    """One dataset of an epoch.

    Args:
        name: its files.
        rows: the rows of its batches in an epoch; a dataset of weight 2 has each twice.
        negatives: hard negatives of a query.
        positives: of a query.
        terms: names of its loss terms; None for all.
    """

    name: str
    rows: int
    negatives: int
    positives: int
    terms: tuple[str, ...] | None


def epoch_rows(data: Any) -> int:
    """Rows of an epoch: those of ``data.train``, or of all batches of ``data.datasets``.

    Args:
        data: the options under ``data:``.

    Raises:
        ValueError: rows that cannot be counted, and no ``max_rows`` says how many they are; or see
            :func:`dataset_shares`.
    """
    if data.datasets is None:
        return _rows(data.train, data.train_split, data.max_rows)
    return sum(share.rows for share in dataset_shares(data))


def dataset_shares(data: Any) -> list[DatasetShare]:
    """What each of ``data.datasets`` has of an epoch; empty where these are not given.

    Args:
        data: the options under ``data:``.

    Raises:
        ValueError: as :func:`epoch_rows`, or a dataset with fewer rows than a batch.
    """
    from ullme.data.mixture import batches_per_pass, epoch_batches

    sets = data.datasets or []
    rows = [_rows(one.train, one.split, one.max_rows, "data.datasets: train") for one in sets]
    passes = batches_per_pass(sets, rows, data.batch_size)
    batches = epoch_batches(passes, [one.weight for one in sets], data.mixture_alpha) if sets else []
    return [
        DatasetShare(
            one.train if isinstance(one.train, str) else ", ".join(one.train),
            count * data.batch_size,
            *_passages(data, one),
            None if one.terms is None else tuple(one.terms),
        )
        for one, count in zip(sets, batches, strict=True)
    ]


def most_passages(data: Any) -> tuple[int, int]:
    """The hard negatives and positives of a query, of the dataset in which these are the most together.

    Args:
        data: the options under ``data:``, or a data module that may lack them.
    """
    own = [_passages(data, one) for one in getattr(data, "datasets", None) or []]
    return max(own or [(getattr(data, "num_hard_negatives", 8), getattr(data, "num_positives", 1))], key=sum)


def _passages(data: Any, one: Any) -> tuple[int, int]:
    """The hard negatives and positives of a query of a dataset: its own numbers, or those under ``data:``."""
    negatives, positives = one.num_hard_negatives, one.num_positives
    return (
        data.num_hard_negatives if negatives is None else negatives,
        data.num_positives if positives is None else positives,
    )


def _rows(train: str | Sequence[str], split: str, max_rows: int | None, option: str = "data.train") -> int:
    """Rows of ``option``. Raises: ValueError: see :func:`epoch_rows`."""
    from ullme.data.files import expand_files

    names = [train] if isinstance(train, str) else train
    try:
        files = [path for name in names for path in expand_files(name, split)]
    except ValueError as error:
        if max_rows is not None:
            return max_rows
        remedy = "pass --rows=N"
        if option != "data.train":
            remedy = "give it max_rows, or pass --rows=N, which plans all steps with all terms"
        raise ValueError(f"{option}={train!r} is not a local file, so its size is unknown; {remedy}") from error
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
