"""Rows with fewer hard negatives than are asked for: which are left out, and which may not borrow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ullme.data.records import Record
from ullme.data.sampler import KnownQueries, ShortRows, draw, positives_of_siblings
from ullme.data.sources import RowSource, Subset

# Rows whose numbers of negatives are in memory at once.
_BLOCK = 1 << 20


def settle_short_rows(
    source: RowSource, num_hard_negatives: int, short_rows: ShortRows, seed: int
) -> tuple[RowSource, int]:
    """The rows to train on, and how many have fewer than N hard negatives of their own (``drop`` leaves them out).

    Raises:
        ValueError: no row is left, or the shortest row cannot be filled.
    """
    short, shortest, least = 0, 0, num_hard_negatives
    for start, counts in _negatives_in_blocks(source):
        short += int((counts < num_hard_negatives).sum())
        if counts.min() < least:
            shortest, least = start + int(counts.argmin()), counts.min()
    if not short:
        return source, 0
    if short_rows == "drop":
        if short == len(source):
            raise ValueError(
                f"data.short_rows=drop leaves no row: all {short} have fewer than "
                f"data.num_hard_negatives={num_hard_negatives} negatives; lower it, or borrow or repeat"
            )
        kept = [start + np.flatnonzero(n >= num_hard_negatives) for start, n in _negatives_in_blocks(source)]
        return Subset(source, np.concatenate(kept)), short
    draw(source, shortest, 0, seed, num_hard_negatives, short_rows)
    return source, short


def _negatives_in_blocks(source: RowSource) -> Iterator[tuple[int, np.ndarray]]:
    """(row of the first, number of negatives of each) of some rows after the other."""
    counts = source.num_negatives
    for start in range(0, len(counts), _BLOCK):
        yield start, counts[start : start + _BLOCK]


def check_no_row_borrows(
    source: RowSource,
    num_hard_negatives: int,
    short_rows: ShortRows,
    whose: str,
    queries: KnownQueries | None = None,
) -> None:
    """Without in-batch negatives, positives of other rows must not come back as hard negatives.

    Reads every row, since a row's negatives that are positives of the same query are not drawn.

    Args:
        source: the rows that are trained on.
        num_hard_negatives: N.
        short_rows: see :func:`ullme.data.sampler.draw`.
        whose: what has ``in_batch_negatives: false``, for messages.
        queries: see :func:`ullme.data.sampler.draw`.

    Raises:
        ValueError: some row would borrow.
    """
    # an unlabelled row has candidates of its own, two at least, which it can repeat
    enough = num_hard_negatives if short_rows == "borrow" else min(1, num_hard_negatives)
    keeps_out = f"{whose} has in_batch_negatives=false, which keeps positives of other rows from being negatives, but "
    lacking = sum(int((counts < enough).sum()) for _, counts in _negatives_in_blocks(source))
    if lacking and short_rows != "drop":
        if short_rows == "borrow":
            what = f"fewer than data.num_hard_negatives={num_hard_negatives} negatives"
            remedy = "set data.short_rows to repeat or drop, or lower data.num_hard_negatives"
        else:
            what = "no negative at all"
            remedy = "set data.short_rows to drop, or give them negatives"
        raise ValueError(
            f"{keeps_out}{lacking} of {len(source)} rows have {what}, and data.short_rows={short_rows} would borrow "
            f"just these positives; {remedy}"
        )
    least = num_hard_negatives if short_rows == "drop" else 0  # shorter rows are left out
    records = (source[row] for row in range(len(source) if num_hard_negatives else 0))
    short = [r.query for r in records if len(r.negatives) >= least and _own_negatives(r, queries or source) < enough]
    if short:
        remedy = "put the positives of a query into one row, or leave out the rows that contradict one another"
        if short_rows == "borrow":
            remedy = f"set data.short_rows=repeat, lower data.num_hard_negatives={num_hard_negatives}, or {remedy}"
        raise ValueError(
            f"{keeps_out}{len(short)} of {len(source)} rows have fewer than {enough} negatives that are no positives "
            f"of another row with the same query (the first: {short[0]!r:.80}), and would borrow; {remedy}"
        )


def _own_negatives(record: Record, queries: KnownQueries) -> int:
    """How many of a row's negatives can be drawn."""
    if not record.labelled:
        return len(record.negatives)
    siblings = positives_of_siblings(record, queries)
    return sum(text not in siblings for text in record.negatives)
