"""Queries that are documents of the corpus themselves, as in BEIR's ArguAna and Quora (arXiv 2104.08663)."""

from __future__ import annotations

from collections.abc import Mapping

from ullme.data.beir import is_copy
from ullme.search.shards import Shards


def find_own_copies(shards: Shards, queries: Mapping[str, str]) -> frozenset[str]:
    """The ids of the queries that are also documents: with the same id and the same text (:func:`is_copy`).

    Such a document is left out of what is found for its own query. Equal ids of different texts are no copies.

    Args:
        shards: of the corpus.
        queries: query id -> text.
    """
    rows = [row for row, key in enumerate(shards.all_ids()) if key in queries]
    return frozenset(d.id for d in shards.documents(rows) if is_copy(queries[d.id], d.text))
