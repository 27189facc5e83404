"""How well the likelihoods of an LLM rank the passages of a query, in every direction that a KL can have.

    python benchmarks/likelihood_rankings.py LLM... --rows rows.jsonl [--max_rows 100] [--negatives 4]

``LLM`` is a hub name or a folder, without an adapter; ``--rows`` has ``query``, ``pos`` and ``neg``. For each direction
of :class:`ullme.losses.KL`: the share of queries whose positive comes first, its mean reciprocal rank, and how surely
it is told from the negatives at several temperatures: −log P(positive), in nats. Where that is lowest the ranking is
as sure as it is right, which is a temperature to begin with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from teacher_agreement import by_temperature
from workload import read_rows

from ullme.batch import Direction
from ullme.data.collator import Collator
from ullme.data.sampler import Draw
from ullme.engine.objective import Objective
from ullme.engine.reference import AdaptersOff
from ullme.engine.teacher_quality import ranking_scores
from ullme.losses import KL
from ullme.losses.ranking import rank_of_first
from ullme.models import ULLME
from ullme.prompts import Prompts

BATCH = 10


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llms", nargs="+", metavar="LLM", help="hub names or folders")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of query, pos, neg; the first rows are taken")
    parser.add_argument("--max_rows", type=int, default=100)
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--query_max_length", type=int, default=32)
    parser.add_argument("--passage_max_length", type=int, default=80)
    return parser.parse_args(argv)


@torch.no_grad()
def scores(model: ULLME, rows: Sequence[Draw], direction: Direction, lengths: tuple[int, int]) -> torch.Tensor:
    """(B, C) mean log-likelihoods in nats a token, the positive's first."""
    term = KL(direction=direction)
    objective = Objective([term], AdaptersOff())
    objective.check(model, len(rows[0].negatives))
    collate = Collator(model.prompt_tokenizer, *lengths, generation=objective.likelihoods)
    batches = [list(enumerate(rows))[n : n + BATCH] for n in range(0, len(rows), BATCH)]
    return torch.cat([ranking_scores(objective, term, model, collate(one).to(model.device)) for one in batches]).cpu()


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    rows = read_rows(options.rows, options.max_rows, options.negatives)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = Prompts(query="{text}", generation="Query: {text}\nPassage: ")  # nothing is embedded here
    for llm in options.llms:
        model = ULLME(llm, lora_name=None, dtype="float32" if device == "cpu" else "auto", prompts=prompts).to(device)
        print(f"{llm}: {len(rows)} rows of {1 + options.negatives} candidates")
        for direction in get_args(Direction):
            found = scores(model, rows, direction, (options.query_max_length, options.passage_max_length))
            first, reciprocal = (values.double().mean().item() for values in rank_of_first(found))
            print(f"    {direction}: positive first {first:.2f}, MRR {reciprocal:.3f}; {by_temperature(found.numpy())}")


if __name__ == "__main__":
    main()
