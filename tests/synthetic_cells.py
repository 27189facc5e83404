"""Invented cells for the tests: no result of any model."""

from __future__ import annotations

import random

from ullme.commands.reproduce.scores import CellScores, TaskScore

TASKS = {"dev": ("Retrieval", "ndcg_at_10"), "news": ("Retrieval", "ndcg_at_10"), "sts": ("STS", "cosine_spearman")}


def cell(model="m", row="a", seed=0, queries=None, notes=None, commands=None, **scores):
    """A cell with these scores (0 to 1); a keyword is a task of TASKS, or else a retrieval task."""
    tasks = [TaskScore(name, *TASKS.get(name, TASKS["dev"]), score) for name, score in scores.items()]
    return CellScores(model, row, seed, tasks, queries or {}, commands or [], notes or {})


def table(rows, seeds=(0, 1, 2), model="m", queries=40, gain=0.05):
    """A cell for every row and seed; each row scores ``gain`` more than the one before, but for a little noise."""
    cells = []
    for place, row in enumerate(rows):
        for seed in seeds:
            noise = random.Random(f"{row} {seed}")
            dev = {f"q{n}": 0.3 + gain * place + noise.gauss(0, 0.02) for n in range(queries)}
            sts = 0.5 + gain * place + noise.gauss(0, 0.002)
            notes = {"tokens": 1000 * place}
            cells.append(cell(model, row, seed, {"dev": dev}, notes, dev=sum(dev.values()) / queries, sts=sts))
    return cells
