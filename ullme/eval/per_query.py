"""Scores of single queries, which paired tests between models need and mteb's result files do not have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.utils import atomic_files

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

# mteb's name of a main score -> the name that pytrec_eval, which computes the scores of a query, gives it.
_PYTREC = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}


def keep_per_query(tasks: Sequence[AbsTask], folder: str | Path) -> dict[str, dict[str, float]]:
    """Make every retrieval and reranking task write ``FOLDER/TASK.json``: {query id: main score of that query}.

    The scores are those that mteb averages, taken from its hook ``task_specific_scores``. The query ids of a subset
    other than "default" are written ``SUBSET:ID``. A task whose main score does not exist for a single query writes
    nothing, and neither does one whose result comes from mteb's cache.

    Args:
        tasks: as :func:`~ullme.eval.find_tasks` returns them; of aggregate tasks each part is wrapped.
        folder: made when the first file is written.

    Returns:
        Task -> what it has written, filled during the evaluation; it stays empty for a result from mteb's cache.
    """
    kept: dict[str, dict[str, float]] = {}
    for task in tasks:
        if parts := getattr(task, "tasks", None):
            kept |= keep_per_query(parts, folder)
        elif hasattr(task, "task_specific_scores") and (key := pytrec_key(task.metadata.main_score)):
            kept[task.metadata.name] = _wrap_task(task, key, Path(folder))
    return kept


def pytrec_key(main_score: str) -> str | None:
    """``ndcg_at_10`` -> ``ndcg_cut_10``; None where a single query has no such score."""
    found = re.fullmatch(r"(ndcg|map|recall|precision)_at_(\d+)", main_score)
    return f"{_PYTREC[found[1]]}_{found[2]}" if found else None


def read_per_query(folder: str | Path) -> dict[str, dict[str, float]]:
    """Task -> query id -> score, from the files of :func:`keep_per_query`; empty if there are none."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}


def _wrap_task(task: Any, key: str, folder: Path) -> dict[str, float]:
    """Write the scores of each query whenever mteb hands them to the task; returns them, which are none yet."""
    own = task.task_specific_scores
    kept: dict[str, float] = {}

    def scores_of_task(
        scores: Mapping[str, Mapping[str, float]], *rest: Any, hf_split: str, hf_subset: str
    ) -> dict[str, float]:
        place = "" if hf_subset == "default" else f"{hf_subset}:"
        kept.update({f"{place}{query}": values[key] for query, values in scores.items() if key in values})
        if kept:
            text = json.dumps(kept)
            file = folder / f"{task.metadata.name}.json"
            atomic_files.write_text(file, text, "--per_query")
        return own(scores, *rest, hf_split=hf_split, hf_subset=hf_subset)

    task.task_specific_scores = scores_of_task
    return kept
