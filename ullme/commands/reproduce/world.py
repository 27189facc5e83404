"""A table's own miniature world and LLM, for tables that say ``world: miniature``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ullme.commands.reproduce.spec import Table


def llm(table: Table) -> str:
    """Folder of the tiny LLM."""
    return str(Path(table.output) / "llm")


def data(table: Table) -> str:
    """Folder of the world: train.jsonl, pretrain.txt, and val/ and dev/ in BEIR layout."""
    return str(Path(table.output) / "world")


def build(table: Table) -> None:
    """Invent the world and pre-train the LLM on its texts, unless an earlier start did; the same bytes every time."""
    from ullme.demo.language_model import build_backbone
    from ullme.demo.world import build_world

    # Nothing here is on the hub, and asking it costs time where there is no network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    place = Path(data(table))
    if not place.is_dir():
        print("== inventing the world", flush=True)
        unfinished = _afresh(place)
        build_world(unfinished)
        unfinished.rename(place)
    if not Path(llm(table)).is_dir():
        print("== pre-training the LLM", flush=True)
        unfinished = _afresh(Path(llm(table)))
        build_backbone(unfinished, (place / "pretrain.txt").read_text(encoding="utf-8").splitlines(), steps=200)
        unfinished.rename(llm(table))


def _afresh(folder: Path) -> Path:
    """An empty folder to fill, which then gets the name it is meant for."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished
