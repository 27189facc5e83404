"""Check that the rows of each dataset have what the loss terms need: positives, negatives, columns of numbers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ullme.batch import ColumnKind
from ullme.data.mixture import Mixture
from ullme.data.sources import RowSource
from ullme.engine.reference import Cached
from ullme.losses import Term

if TYPE_CHECKING:
    from ullme.engine.objective import Objective

log = logging.getLogger(__name__)

# Rows of a dataset whose numbers are checked for plausibility before training.
_SAMPLED_ROWS = 200


def check_columns(
    terms: Iterable[Term], columns: Mapping[str, ColumnKind], num_hard_negatives: int, where: str = ""
) -> None:
    """Refuse a term whose columns no row has, or which are of the wrong kind.

    Args:
        terms: of the objective.
        columns: those that some row has a number in, with their kind.
        num_hard_negatives: N.
        where: the dataset, for the message.

    Raises:
        ValueError: a column that a term reads is missing, or has a number for each query in place of each candidate,
            or the other way round.
    """
    for term in terms:
        if missing := [name for name in term.columns if name not in columns]:
            held = f"they have {', '.join(map(repr, columns))}" if columns else "they have no column of numbers"
            raise ValueError(
                f"loss term {term.name} reads the column {' and '.join(map(repr, missing))}, in which no row{where} "
                f"has a number ({held}); give rows with it (docs/data.md), name its field in data.columns, or leave "
                "the term out"
            )
        try:
            term.check_columns(columns, num_hard_negatives)
        except ValueError as error:
            raise ValueError(f"the rows{where}: {error}" if where else str(error)) from None


def check_positives(terms: Collection[Term], num_positives: int, where: str = "") -> None:
    """Refuse to draw several positives of a row that no term would look at.

    Args:
        terms: of the objective.
        num_positives: the most that are drawn of a row.
        where: the dataset, for the message.

    Raises:
        ValueError: several, and no term looks at more than the first.
    """
    if num_positives > 1 and not any(term.uses_extra_positives for term in terms):
        names = ", ".join(term.name for term in terms)
        raise ValueError(
            f"data.num_positives={num_positives}{where}, but {names} would look at the first positive of a row only; "
            "set InfoNCE.positives=all (configs/loss/several_positives.yaml), or num_positives=1"
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


def warn_of_doubts(terms: Iterable[Term], source: RowSource, where: str = "") -> None:
    """Warn of numbers that do not suit a term's options, by rows evenly spaced over the source."""
    if not source.columns:
        return
    places = range(0, len(source), -(-len(source) // _SAMPLED_ROWS))
    rows = [source[place].columns for place in places]
    for term in terms:
        if doubt := term.doubt(rows):
            log.warning("loss: the rows%s: %s", where, doubt)


def kinds_of_batches(source: RowSource | None) -> list[tuple[tuple[str, ...] | None, dict[str, ColumnKind]]]:
    """Of each dataset, the names of its loss terms (None: all) and its columns."""
    if source is None:
        return [(None, {})]
    if isinstance(source, Mixture):
        pairs = zip(source.sets, source.sources, strict=True)
        return [(None if sets.terms is None else tuple(sets.terms), one.columns) for sets, one in pairs]
    return [(None, source.columns)]


def datasets_for_teacher(data: Any, term: str) -> list[int]:
    """Which datasets show how well a teacher ranks: those whose rows have a known positive and hard negatives.

    Args:
        data: the data module, set up.
        term: name of the loss term that learns from the teacher. Datasets that have it go first; where none of them has
            labels, the teacher is measured on the others.

    Returns:
        Places among ``data.sources``; empty where no dataset is of use.
    """
    sets = data.source.sets if isinstance(data.source, Mixture) else data.sets
    of_term: list[int] = []
    others: list[int] = []
    for place, (settings, source) in enumerate(zip(sets, data.sources, strict=True)):
        own = settings.num_hard_negatives
        if source.labelled and (data.num_hard_negatives if own is None else own) > 0:
            (of_term if settings.terms is None or term in settings.terms else others).append(place)
    return of_term or others


def check_rows(objective: Objective, data: Any, warn: bool = True) -> None:
    """Refuse terms whose needs a dataset does not meet, before a model is loaded.

    Args:
        objective: of the run.
        data: the data module, set up; without a ``source`` only its options are looked at.
        warn: whether to name columns, terms and a cache that are not used.

    Raises:
        ValueError: a term lacks its columns, positives or negatives, all terms have weight 0, no term looks at all
            positives that are drawn, or a dataset names a term that there is not.
    """
    if warn and isinstance(objective.reference, Cached) and not objective.uses_reference:
        log.warning(
            "loss.cache_reference=%s is neither read nor filled: it holds likelihoods of the reference, which no term "
            "of the loss needs (%s); DPO, IPO, hinge and KTO do, and a KL with teacher=reference",
            objective.reference.folder,
            ", ".join(term.name for term in objective.terms),
        )
    source, negatives = getattr(data, "source", None), getattr(data, "num_hard_negatives", 1)
    positives = getattr(data, "num_positives", 1)
    if not isinstance(source, Mixture):
        objective.check_rows(negatives, getattr(data, "labelled", True))
        check_positives(objective.terms, positives)
        if source is not None:
            _check_columns(objective.terms, source, negatives, "", warn)
        return
    for settings, one in zip(source.sets, source.sources, strict=True):
        where, part = f" of {settings.train!r}", objective.of_terms(settings.terms)
        own = negatives if settings.num_hard_negatives is None else settings.num_hard_negatives
        part.check_rows(own, one.labelled, where)
        check_positives(part.terms, positives if settings.num_positives is None else settings.num_positives, where)
        _check_columns(part.terms, one, own, where, warn)
    named = [settings.terms for settings in source.sets]
    used = {name for terms in named for name in terms or []}
    unused = [term.name for term in objective.terms if term.name not in used]
    if warn and unused and None not in named:
        log.warning("data.datasets: no dataset names the loss term %s, so it is never used", ", ".join(unused))


def _check_columns(terms: list[Term], source: RowSource, num_hard_negatives: int, where: str, warn: bool) -> None:
    check_columns(terms, source.columns, num_hard_negatives, where)
    if warn:
        warn_of_unused_columns(terms, source.columns, where)
        warn_of_doubts(terms, source, where)
