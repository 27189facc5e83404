"""Texts and writers that the tests of evaluation share."""

from __future__ import annotations

import json
from pathlib import Path

DOCUMENTS = [
    "the cat sleeps on the warm mat",
    "a dog barks at the red car",
    "stars shine over the quiet sea",
    "bread is baked in a hot oven",
    "the train leaves the old station",
    "rain falls on the green hills",
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
