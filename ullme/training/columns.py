"""Whether the training rows have the numbers that losses read, and the losses read those that the rows have."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from ullme.losses import Term

log = logging.getLogger(__name__)


def check_columns(terms: Iterable[Term], columns: Collection[str], where: str = "") -> None:
    """Refuse a term whose columns no row has.

    Args:
        terms: of the objective.
        columns: those that some row has a number in.
        where: the dataset, for the message.

    Raises:
        ValueError: a column that a term reads is missing.
    """
    for term in terms:
        if missing := [name for name in term.columns if name not in columns]:
            held = f"they have {', '.join(map(repr, columns))}" if columns else "they have no column of numbers"
            raise ValueError(
                f"loss term {term.name} reads the column {' and '.join(map(repr, missing))}, in which no row{where} "
                f"has a number ({held}); give rows with it (docs/data.md), name its field in data.columns, or leave "
                "the term out"
            )


def warn_of_unused_columns(terms: Iterable[Term], columns: Collection[str], where: str = "") -> None:
    """Name the columns that no term reads, in one warning; results stay right without them."""
    read = {name for term in terms for name in term.columns}
    if unused := [name for name in columns if name not in read]:
        log.warning(
            "data: the rows%s have the column %s, and no loss term reads it (loss.terms); a distillation term would",
            where,
            ", ".join(unused),
        )
