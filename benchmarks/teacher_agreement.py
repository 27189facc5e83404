"""What trained embedders already know of the ranking by the frozen LLM's query likelihood, on rows they have not seen.

    python benchmarks/teacher_agreement.py RUN... --rows held_out.jsonl [--max_rows 128] [--negatives 4]

``RUN`` is a training's folder or checkpoint; all are of one LLM with an adapter. ``--rows`` has ``query``, ``pos`` and
``neg``. For each run: how often the cosine ranks the positive first, how often the teacher does, how often both rank
the same candidate first, and, where only one of the two is right, which; and the KL from the teacher's distribution to
the cosines' (in nats, temperatures as in configs/paper/query_distillation.yaml). For the teacher and each run also how
surely the positive is told from the negatives at several temperatures: −log P(positive), in nats. Where that is lowest
the ranking is as sure as it is right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from workload import read_rows

from ullme.data.sampler import Draw
from ullme.losses.kl import kl_loss
from ullme.models import ULLME
from ullme.models.checkpoint import load_ullme
from ullme.models.query_likelihood import mean_query_logps

COSINE_TEMPERATURE, TEACHER_TEMPERATURE = 0.05, 0.25
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0, 2.0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a training's folder, or a checkpoint")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of query, pos, neg that no run has seen")
    parser.add_argument("--max_rows", type=int, default=128)
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--query_max_length", type=int, default=24)
    parser.add_argument("--passage_max_length", type=int, default=40)
    return parser.parse_args(argv)


def teacher_scores(model: ULLME, rows: list[Draw], query_max_length: int, passage_max_length: int) -> np.ndarray:
    """(B, C) mean log π_ref(q|p), in nats a token."""
    pairs = [(row.query, candidate) for row in rows for candidate in (row.positive, *row.negatives)]
    lengths = {"query_max_length": query_max_length, "passage_max_length": passage_max_length}
    return mean_query_logps(model, pairs, **lengths).reshape(len(rows), -1)


def cosines(model: ULLME, rows: list[Draw], query_max_length: int, passage_max_length: int) -> np.ndarray:
    """(B, C)."""
    queries = np.asarray(model.encode([row.query for row in rows], role="query", max_length=query_max_length))
    passages = [candidate for row in rows for candidate in (row.positive, *row.negatives)]
    embedded = np.asarray(model.encode(passages, role="passage", max_length=passage_max_length))
    return np.einsum("bd,bcd->bc", queries, embedded.reshape(len(rows), -1, queries.shape[1]))


def compared(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """What the docstring of this file lists, from (B, C) scores whose first column is the positive's."""
    ours, theirs = student.argmax(1), teacher.argmax(1)
    scores = (torch.tensor(student) / COSINE_TEMPERATURE, torch.tensor(teacher) / TEACHER_TEMPERATURE)
    return {
        "right": float((ours == 0).mean()),
        "teacher right": float((theirs == 0).mean()),
        "same first": float((ours == theirs).mean()),
        "only teacher right": float(((ours != 0) & (theirs == 0)).mean()),
        "only cosine right": float(((ours == 0) & (theirs != 0)).mean()),
        "KL": kl_loss(*scores, direction="generation_to_retrieval").mean().item(),
    }


def positive_cross_entropy(scores: np.ndarray, temperature: float) -> float:
    """Mean −log P(positive) in nats, from (B, C) scores whose first column is the positive's; log C for a uniform P."""
    return cross_entropy(torch.tensor(scores).double() / temperature, torch.zeros(len(scores), dtype=torch.long)).item()


def by_temperature(scores: np.ndarray) -> str:
    """The cross-entropy at each of :data:`TEMPERATURES`, in words."""
    return "-log P(positive) at " + ", ".join(f"{t:g}: {positive_cross_entropy(scores, t):.3f}" for t in TEMPERATURES)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    rows = read_rows(options.rows, options.max_rows, options.negatives)
    lengths = (options.query_max_length, options.passage_max_length)
    teacher: np.ndarray | None = None
    for run in options.runs:
        model = load_ullme(run).eval()
        if teacher is None:
            teacher = teacher_scores(model, rows, *lengths)
            print(f"teacher: {by_temperature(teacher)}", flush=True)
        scores = cosines(model, rows, *lengths)
        found = compared(scores, teacher)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"{run}: {len(rows)} rows; {figures}\n    {by_temperature(scores)}", flush=True)


if __name__ == "__main__":
    main()
