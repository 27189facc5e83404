"""mteb's result files, read for the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Score:
    """One task's result.

    Args:
        task: mteb's name of the task.
        revision: of its data.
        value: mean main score over splits and subsets, times 100.
    """

    task: str
    revision: str
    value: float


def read_scores(folder: str | Path) -> list[Score]:
    """The scores of one model in a folder of result files, by task.

    Args:
        folder: what ``evaluate.py --output`` wrote, or the part of it that belongs to one model.

    Raises:
        ValueError: no such folder, no results, or results of several models or of several revisions of one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--results {folder}: no such folder; give what evaluate.py wrote with --output")
    found: dict[Path, list[Score]] = {}
    for file in sorted(folder.rglob("*.json")):
        if (score := _read(file)) is not None:
            found.setdefault(file.parent, []).append(score)
    if not found:
        raise ValueError(f"--results {folder} holds no result files of mteb; give what evaluate.py wrote with --output")
    if len(found) > 1:
        names = ", ".join(str(place) for place in list(found)[:4])
        raise ValueError(f"--results {folder} holds results of several models or revisions; name one of {names}")
    return next(iter(found.values()))


def _read(file: Path) -> Score | None:
    """A result file's score; None for another JSON file. Raises: ValueError: a result file that is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--results: {file} cannot be read ({error}); evaluate again with --overwrite") from None
    if not isinstance(content, dict) or not {"task_name", "scores"} <= content.keys():
        return None
    values = [part["main_score"] for parts in content["scores"].values() for part in parts]
    if not values:
        return None
    return Score(content["task_name"], str(content.get("dataset_revision", "")), 100 * sum(values) / len(values))
