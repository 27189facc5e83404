"""Queries that are kept out of training, each with its own document as the judgement: a validation set without labels.

They have not passed the round trip: by BM25 it keeps what BM25 finds, which would decide any comparison with BM25.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ullme.query_generation.writer import WrittenQuery
from ullme.utils import atomic_files

QUERIES = "queries.jsonl"
QRELS = "qrels.tsv"
# Enough to compare searches on; more would be missing in training.
MAX_DOCUMENTS = 500


@dataclass(frozen=True)
class HeldOutSettings:
    """Which queries are held out, and where they are written.

    Args:
        folder: of queries.jsonl and qrels.tsv.
        share: of the documents, drawn at random, at most :data:`MAX_DOCUMENTS` documents.
        seed: of the draw.
    """

    folder: Path
    share: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raises: ValueError: the share is out of range."""
        if not 0 < self.share < 1:
            raise ValueError(
                f"--held_out_share {self.share} must be above 0 and below 1; leave --held_out away to hold out nothing"
            )


def draw_documents(documents: Sequence[str], settings: HeldOutSettings) -> set[str]:
    """The documents whose queries are held out: at least one, and not all.

    Args:
        documents: ids of those that have a query.
        settings: how many.

    Raises:
        ValueError: there are fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(
            f"--held_out: {len(documents)} documents have a query, which cannot be divided; ask for more documents"
        )
    number = min(max(1, round(settings.share * len(documents))), MAX_DOCUMENTS, len(documents) - 1)
    places = np.random.default_rng([settings.seed, len(documents)]).choice(len(documents), number, replace=False)
    return {documents[place] for place in places.tolist()}


def write(queries: Iterable[WrittenQuery], folder: Path) -> int:
    """Write queries.jsonl (``_id``, ``text``) and qrels.tsv, as in BEIR; each text once.

    Returns:
        The number of queries.

    Raises:
        ValueError: the folder cannot be written.
    """
    from ullme.query_generation.round_trip import Kept

    found = list(queries)
    kept = list(Kept(1).filter(found, [1] * len(found)))
    names = [f"{query.document}-{query.number}" for query in kept]
    judgements = [f"{name}\t{query.document}\t1\n" for name, query in zip(names, kept, strict=True)]
    rows = [{"_id": name, "text": query.text} for name, query in zip(names, kept, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(folder / QRELS, "query-id\tcorpus-id\tscore\n" + "".join(judgements), "--held_out")
    atomic_files.write_text(folder / QUERIES, "".join(lines), "--held_out")
    return len(kept)
