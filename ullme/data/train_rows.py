"""Opening the rows of a dataset for training: which options apply, which rows are used, and what is logged of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ullme.data.columns import split_option
from ullme.data.mixture import TrainSet
from ullme.data.sampler import ShortRows
from ullme.data.short_rows import settle_short_rows
from ullme.data.sources import RowSource
from ullme.data.unread_fields import log_unread, warn_of_empty_columns

log = logging.getLogger(__name__)


def usable_rows(
    dataset: TrainSet,
    source: RowSource,
    num_hard_negatives: int,
    short_rows: ShortRows,
    seed: int,
    of_several: bool,
    quiet: bool,
) -> RowSource:
    """The rows to train on; skipped and short rows are logged.

    Args:
        dataset: the settings of the dataset.
        source: its rows, opened.
        num_hard_negatives: N, where the dataset has no number of its own.
        short_rows: see :func:`ullme.data.sampler.draw`.
        seed: of the run.
        of_several: whether there are other datasets, so that messages name this one.
        quiet: log nothing, as on all ranks but one.

    Raises:
        ValueError: too few negatives for the options.
    """
    own = dataset.num_hard_negatives
    negatives = num_hard_negatives if own is None else own
    usable, short = settle_short_rows(source, negatives, short_rows, seed)
    if quiet:
        return usable
    log.info("data: %d rows to train on%s", len(usable), f" in {dataset.train}" if of_several else "")
    log_unread(dataset.train, source)
    warn_of_empty_columns(dataset.train, source, dataset.columns)
    if source.skipped:
        log.warning("data: skipped %d bad rows, the first: %s", len(source.skipped), source.skipped[:3])
    if short:
        log.warning(
            "data: %d of %d rows have fewer than %d hard negatives (data.short_rows=%s)",
            short,
            len(source),
            negatives,
            short_rows,
        )
    return usable


# Options of data.train that each of data.datasets has for itself, by their names there -> what they are if unset.
_OF_ONE_DATASET = {"columns": None, "schema": "auto", "max_rows": None, "train_name": None, "train_split": "train"}


def check_beside_datasets(options: Mapping[str, Any]) -> None:
    """Refuse options of ``data.train`` that would be ignored beside ``data.datasets``.

    Args:
        options: the value of each of the options that a dataset has for itself.

    Raises:
        ValueError: one is set.
    """
    for name, value in options.items():
        unset = _OF_ONE_DATASET[name]
        if value != unset:
            raise ValueError(
                f"data.{name}={value!r} is for data.train; set data.{name}={'null' if unset is None else unset}, and "
                f"give {name.removeprefix('train_')} to each of data.datasets"
            )


def check_mixture_drops_last(drop_last: bool) -> None:
    """Raises: ValueError: a mixture is asked for batches that are not full."""
    if not drop_last:
        raise ValueError(
            "data.drop_last=false: each batch of a mixture is of one dataset, and the rows of a pass that do not fill "
            "a batch are left out of it; leave data.drop_last out"
        )


def datasets_of_entries(dataset: TrainSet, mixture_alpha: float) -> list[TrainSet]:
    """Each entry of a ``train`` list as a dataset of its own, for ``data.mixture_alpha`` below 1.

    Args:
        dataset: with a list of files, patterns or folders.
        mixture_alpha: α.

    Raises:
        ValueError: fewer than two entries, or an option that is about all rows of the list.
    """
    train = dataset.train
    if isinstance(train, str) or len(train) < 2:
        raise ValueError(
            f"data.mixture_alpha={mixture_alpha} weighs data.datasets or the entries of a list in data.train, and "
            f"data.train={train!r} is one dataset; list its files, or leave data.mixture_alpha out"
        )
    _, side_files = split_option(dataset.columns)
    for option, given in (("max_rows", dataset.max_rows), ("columns", next(iter(side_files.values()), None))):
        if given is not None:
            raise ValueError(
                f"data.mixture_alpha={mixture_alpha} makes a dataset of each entry of data.train, and "
                f"data.{option}={str(given)!r} is of all rows together; give each entry its own in data.datasets"
            )
    return [replace(dataset, train=entry) for entry in train]
