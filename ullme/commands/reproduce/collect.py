"""Collecting the results of a cell, once it is trained and evaluated, into its scores.json."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ullme.callbacks.throughput import TOTALS_FILE
from ullme.commands.reproduce.cells import Cell, shell_line
from ullme.commands.reproduce.scores import CellScores, TaskScore, write_scores
from ullme.eval.per_query import read_per_query
from ullme.eval.table import read_rows
from ullme.utils import atomic_files

SECONDS_FILE = "seconds.json"
TASKS_FILE = "tasks.json"  # what evaluate.py --scores writes
_LIBRARIES = ("ullme", "torch", "transformers", "peft", "lightning", "mteb")


def collect_scores(cell: Cell) -> CellScores:
    """Read what a cell's evaluation and training wrote, and write its scores.json."""
    rows = read_rows(cell.folder / TASKS_FILE)
    tasks = [TaskScore(plain_name(r.task), r.type, r.main_score, r.score / 100) for r in rows if r.score is not None]
    failed = {plain_name(r.task): r.error or "no score" for r in rows if r.score is None}
    known = {row.task for row in rows}
    queries = {plain_name(t): q for t, q in read_per_query(cell.folder / "per_query").items() if t in known}
    commands = [cell.train_command(stage) for stage, _ in cell.stages] + [cell.evaluate_command()]
    scores = CellScores(
        cell.model_id,
        cell.row_id,
        cell.seed,
        tasks,
        queries,
        [shell_line(command) for command in commands],
        {**machine(), "seconds": seconds(cell), **training_totals(cell)},
        failed,
    )
    write_scores(cell.folder, scores)
    return scores


def plain_name(task: str) -> str:
    """The name of a local task without the hash of its files."""
    return re.sub(r"-[0-9a-f]{8}$", "", task)


def machine() -> dict[str, Any]:
    """The hardware and the versions of Python and the libraries."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cpu": _cpu()}
    if count := torch.cuda.device_count():
        found["gpu"] = f"{count} x {torch.cuda.get_device_name(0)}"
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def seconds(cell: Cell) -> dict[str, float]:
    """Wall-clock seconds of each training and of the evaluation, start-up and earlier attempts included."""
    file = cell.folder / SECONDS_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def add_seconds(cell: Cell, what: str, took: float) -> None:
    """Add the seconds of an attempt, also of one that was stopped or failed."""
    total = {**seconds(cell), what: round(seconds(cell).get(what, 0) + took, 3)}
    text = json.dumps(total)
    atomic_files.write_text(cell.folder / SECONDS_FILE, text, "--output")


def training_totals(cell: Cell) -> dict[str, Any]:
    """The sums of ``tokens``, ``queries`` and ``training_seconds`` (without validation) over the cell's stages.

    Zeros for an untrained LLM; empty for an embedder from elsewhere, whose training is not known.
    """
    names = {"tokens": "tokens", "queries": "queries", "training_seconds": "seconds"}
    if cell.row.stages and not cell.row.trained:
        return dict.fromkeys(names, 0)
    files = [folder / TOTALS_FILE for _, folder in cell.stages]
    if not files or not all(file.is_file() for file in files):
        return {}
    seen = [json.loads(file.read_text()) for file in files]
    return {name: round(sum(one[key] for one in seen), 1) for name, key in names.items()}
