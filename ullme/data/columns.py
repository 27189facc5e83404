"""Numbers of a row by name (teacher scores, labels): where they are read from, and that they fit the row's texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from ullme.batch import ColumnKind
from ullme.data.bad_row import BadRow

# Name -> a number of the query, or one number for each positive and then each negative; NaN where there is none.
Columns = Mapping[str, float | tuple[float, ...]]

# What ``data.columns`` may be: names of fields, or column -> field or side file.
ColumnOption = dict[str, str] | list[str] | None

# Fields that are read without being named, the first that a row has: of BGE's and of sentence-transformers' data sets.
# With a list for the positives and one for the negatives, they are called pos_scores and neg_scores.
_STANDARD: dict[str, tuple[str, ...]] = {"score": ("scores", "score", "label", "labels")}
_STANDARD_FIELDS = frozenset(
    prefix + field for fields in _STANDARD.values() for field in fields for prefix in ("", "pos_", "neg_")
)
_LARGEST = 3.4e38  # of float32, in which columns reach the loss
_SIDE_FILES = (".jsonl", ".json", ".ndjson")
# What is the name of a file, and no side file that can be read.
_OTHER_FILES = (
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".tsv",
    ".csv",
    ".txt",
    ".parquet",
    ".arrow",
    ".npy",
    ".npz",
    ".pt",
)

NO_FIELDS: Mapping[str, str] = {}


def kind_of(value: float | tuple[float, ...]) -> ColumnKind:
    """Of one row's value."""
    return "candidate" if isinstance(value, tuple) else "query"


def has_number(value: float | tuple[float, ...]) -> bool:
    """Whether anything in it is not missing."""
    return any(not math.isnan(one) for one in (value if isinstance(value, tuple) else (value,)))


def holds_numbers(value: Any) -> bool:
    """Whether a field's value is a number, or a list with numbers only."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, Real) and not isinstance(one, bool) for one in values)


def split_option(option: ColumnOption, name: str = "data.columns") -> tuple[dict[str, str], dict[str, str]]:
    """Column -> field of the row, and column -> side file.

    Raises:
        ValueError: a column without a name, a field or a file, or a file of another kind than JSON lines.
    """
    named = option if isinstance(option, dict) else {one: one for one in option or []}
    for column, source in named.items():
        if not column.strip() or not str(source or "").strip():
            raise ValueError(
                f"{name}={option!r}: give names of fields, or column: field, or column: file.jsonl for each"
            )
        if Path(source).suffix.lower() in _OTHER_FILES:
            read = ", ".join(_SIDE_FILES)
            raise ValueError(f"{name}.{column}={source!r}: a side file holds JSON lines ({read}); convert or unpack it")
    files = {column: source for column, source in named.items() if Path(source).suffix.lower() in _SIDE_FILES}
    return {column: source for column, source in named.items() if column not in files}, files


def read_columns(
    row: Mapping[str, Any],
    passages: Sequence[Any],
    num_positives: int,
    fields: Mapping[str, str] = NO_FIELDS,
    side: Mapping[str, Any] = NO_FIELDS,
) -> dict[str, float | tuple[float, ...]]:
    """The numbers of a raw row.

    Args:
        row: field -> value.
        passages: its positives and then its negatives, as the row has them: texts, or objects with fields of their own.
        num_positives: how many of them are positives.
        fields: column -> field, besides those that are always read.
        side: column -> value in a side file.

    Raises:
        BadRow: a list of another length than the row's texts, or what is no number.
    """
    found: dict[str, float | tuple[float, ...]] = {}
    for column, field in fields.items():
        if (value := _of_field(row, passages, num_positives, field)) is not None:
            found[column] = value
    for column, raw in side.items():
        if (value := _of_value(raw, num_positives, len(passages), f"data.columns.{column}")) is not None:
            found[column] = value
    taken = set(fields.values())
    objects = any(not isinstance(passage, str) and isinstance(passage, Mapping) for passage in passages)  # str is quick
    if objects or not _STANDARD_FIELDS.isdisjoint(row):
        for column, names in _STANDARD.items():
            for field in names:
                if column not in found and field not in taken:
                    value = _of_field(row, passages, num_positives, field)
                    if value is not None:
                        found[column] = value
                        taken.add(field)
    return found


def unread_fields(row: Mapping[str, Any], known: Iterable[str], fields: Mapping[str, str]) -> list[str]:
    """Fields of a row that neither its schema nor a column reads."""
    read = {*known, *(prefix + field for field in fields.values() for prefix in ("", "pos_", "neg_"))}
    unread = [str(field) for field in row if field not in read and field not in _STANDARD_FIELDS]
    # of the fields that are always read, the first that a row has is the one
    given = [f for f in _STANDARD["score"] if f not in read and any(p + f in row for p in ("", "pos_", "neg_"))]
    return unread + given[1:]


def _of_field(
    row: Mapping[str, Any], passages: Sequence[Any], num_positives: int, field: str
) -> float | tuple[float, ...] | None:
    """A number, a list, two lists (``pos_`` and ``neg_``), or a field of each passage."""
    if row.get(field) is not None:
        return _of_value(row[field], num_positives, len(passages), field)
    sides = {"pos": row.get(f"pos_{field}"), "neg": row.get(f"neg_{field}")}
    if sides != {"pos": None, "neg": None}:
        return _two_lists(sides, num_positives, len(passages), f"pos_{field}", f"neg_{field}")
    if any(isinstance(passage, Mapping) and passage.get(field) is not None for passage in passages):
        return tuple(
            _number(passage.get(field) if isinstance(passage, Mapping) else None, f"{field} of passage {n + 1}")
            for n, passage in enumerate(passages)
        )
    return None


def _of_value(raw: Any, num_positives: int, count: int, where: str) -> float | tuple[float, ...] | None:
    if raw is None:
        return None
    if isinstance(raw, Mapping):
        if unknown := sorted(map(str, raw.keys() - {"pos", "neg"})):
            raise BadRow(
                f"'{where}' has the keys {unknown}; it must be a number, a list, or an object with pos and neg"
            )
        return _two_lists(raw, num_positives, count, f"{where}.pos", f"{where}.neg")
    if isinstance(raw, list | tuple):
        return _numbers(
            raw, count, where, f"a positive each, then a negative each ({num_positives} + {count - num_positives})"
        )
    if isinstance(raw, str):  # every cell of a CSV file is a text
        try:
            raw = float(raw)
        except ValueError:
            raise BadRow(f"'{where}' must be a number, not the text {raw!r:.40}") from None
    return _number(raw, where)


def _two_lists(raw: Mapping[str, Any], num_positives: int, count: int, pos: str, neg: str) -> tuple[float, ...]:
    """One list for the positives and one for the negatives; either may be missing."""
    values: tuple[float, ...] = ()
    for side, where, expected in (("pos", pos, num_positives), ("neg", neg, count - num_positives)):
        given = raw.get(side)
        if given is not None and not isinstance(given, list | tuple):
            raise BadRow(f"'{where}' must be a list of numbers, not {type(given).__name__}")
        texts = "positive" if side == "pos" else "negative"
        values += (math.nan,) * expected if given is None else _numbers(given, expected, where, f"one for each {texts}")
    return values


def _numbers(values: Sequence[Any], expected: int, where: str, meaning: str) -> tuple[float, ...]:
    if len(values) != expected:
        raise BadRow(
            f"'{where}' holds {len(values)} numbers for {expected} texts; give {meaning}, null where there is none"
        )
    return tuple(_number(value, f"{where}[{n}]") for n, value in enumerate(values))


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise BadRow(f"'{where}' must be a number or null, not {type(value).__name__} ({value!r:.40})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if abs(number) > _LARGEST:
        raise BadRow(f"'{where}' is {value!r:.40}, too large for a number in float32; give null where there is none")
    return number
