"""Fields of the rows that nothing reads, and columns that no row has, are named in the log."""

from __future__ import annotations

import logging

from ullme.data.columns import ColumnOption, holds_numbers, split_option
from ullme.data.sources import RowSource

log = logging.getLogger(__name__)

# What other projects call the instruction of a row.
_INSTRUCTIONS = ("instruction", "instruct", "prompt", "task", "query_instruction", "query_prompt")


def warn_of_empty_columns(name: str | list[str], source: RowSource, columns: ColumnOption) -> None:
    """Name the columns of ``data.columns`` in which no row has a number, such as one whose field is misspelt.

    Args:
        name: of the dataset.
        source: its rows.
        columns: the option.
    """
    fields, files = split_option(columns)
    for column, origin in {**fields, **files}.items():
        if column not in source.columns:
            log.warning("data.columns: %s=%s: no row of %s has a number there", column, origin, name)


def log_unread(name: str | list[str], source: RowSource) -> None:
    """Name the unread fields once: as a warning those of numbers, which a loss might want, and what looks like a row's
    own instruction.

    Args:
        name: of the dataset.
        source: its rows.
    """
    numbers = [field for field, value in source.unread.items() if holds_numbers(value)]
    if numbers:
        log.warning(
            "data: nothing reads the numbers in the fields %s of %s; name those that a loss needs in data.columns",
            ", ".join(numbers),
            name,
        )
    instructions = [field for field in source.unread if field.lower() in _INSTRUCTIONS and field not in numbers]
    if instructions:
        log.warning(
            "data: nothing reads the field %s of %s; a row's instruction is called prompt, beside query and pos",
            ", ".join(instructions),
            name,
        )
    if others := [field for field in source.unread if field not in (*numbers, *instructions)]:
        log.info("data: nothing reads the fields %s of %s", ", ".join(others), name)
