"""Check that every contrastive loss has negatives, in the batch or in the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ullme.losses import InfoNCE, Matryoshka, Term


def contrastive(terms: Iterable[Term]) -> Iterator[InfoNCE]:
    """The contrastive losses among terms, also those that are nested (Matryoshka)."""
    for term in terms:
        inner = term.term if isinstance(term, Matryoshka) else term
        if isinstance(inner, InfoNCE):
            yield inner


def check_negatives(
    terms: Iterable[Term],
    batch_size: int,
    num_hard_negatives: int,
    in_batch_negatives: bool = True,
    where: str = "",
) -> None:
    """Refuse a contrastive loss without any negative: its value and its gradient are 0 throughout.

    Args:
        terms: of the objective.
        batch_size: queries of a global batch.
        num_hard_negatives: N.
        in_batch_negatives: whether the data lets queries use each other's passages.
        where: the dataset, for the message.

    Raises:
        ValueError: a term has no negatives.
    """
    for term in contrastive(terms):
        if num_hard_negatives > 0:
            continue
        shared = in_batch_negatives and term.in_batch_negatives
        if batch_size == 1 or not shared:
            missing = "data.batch_size=1" if batch_size == 1 else "in_batch_negatives=false"
            raise ValueError(
                f"loss term {term.name} compares a positive with negatives, and with data.num_hard_negatives=0 and "
                f"{missing}{where} there is no negative; give hard negatives, or larger batches with in-batch negatives"
            )
