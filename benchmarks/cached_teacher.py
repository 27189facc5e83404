"""What a KL to the frozen LLM's query likelihood costs beside contrastive learning alone, with a cold and a warm cache.

    python benchmarks/cached_teacher.py --llm LLM --rows train.jsonl [--queries 8] [--rounds 3]

``--rows`` has ``query``, ``pos`` and ``neg``. The steps take turns in one process: InfoNCE; InfoNCE + KL, whose teacher
is computed; the same with likelihoods that ``loss.cache_reference`` holds from an earlier epoch. A step begins with the
rows, so that the tokens of prompts count too, and ends with the gradient. CPU seconds on one thread; on a GPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from machine import machine
from workload import read_rows

from ullme.data.collator import Collator
from ullme.data.sampler import Draw
from ullme.engine.gradcache import chunk_slices, count_retained, microbatch_rows
from ullme.engine.objective import Objective
from ullme.engine.reference import AdaptersOff, Cached
from ullme.losses import KL, InfoNCE, Term
from ullme.models import ULLME
from ullme.planning.auto_chunk import largest_chunk
from ullme.prompts import Prompts

NAMES = ("CL", "CL + KL, teacher computed", "CL + KL, warm cache")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="hub name or folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of query, pos, neg; the first rows are taken")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--negatives", type=int, default=3)
    parser.add_argument("--query_max_length", type=int, default=32)
    parser.add_argument("--passage_max_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(argv)


def kl() -> KL:
    """As in configs/paper/query_distillation.yaml."""
    return KL(
        direction="query_given_passage",
        teacher="reference",
        divergence="generation_to_retrieval",
        retrieval_temperature=0.05,
        generation_temperature=0.25,
    )


def make_steps(model: ULLME, draws: list[tuple[int, Draw]], lengths: Sequence[int], cache: str) -> dict[str, Callable]:
    """A step by name; each returns its loss."""
    least = (1 + len(draws[0][1].negatives)) * sum(lengths)
    chunking = largest_chunk(model, half=model.device.type == "cuda", least=least, chunk_tokens=None)

    def step(terms: list[Term], reference: Cached | AdaptersOff) -> Callable[[], float]:
        objective = Objective(terms, reference)
        objective.check(model, len(draws[0][1].negatives))
        collate = Collator(model.prompt_tokenizer, *lengths, generation=objective.likelihoods)

        def run() -> float:
            model.zero_grad()
            batch = collate(draws).to(model.device)
            chunks = chunk_slices(batch, None, chunking.chunk_tokens)
            microbatches = microbatch_rows(batch, chunking.chunk_tokens)
            retained = count_retained(batch, microbatches, chunking.retained_tokens)
            logs = objective.grad_cache(model, batch, chunks, microbatches=microbatches, num_retained=retained)
            return logs["loss"].item()

        return run

    made = (
        step([InfoNCE(0.05)], AdaptersOff()),
        step([InfoNCE(0.05), kl()], AdaptersOff()),
        step([InfoNCE(0.05), kl()], Cached(cache, AdaptersOff())),
    )
    return dict(zip(NAMES, made, strict=True))


def measure(steps: dict[str, Callable[[], float]], rounds: int, on_gpu: bool) -> dict[str, float]:
    """Median seconds of each step; a first round, which also fills the cache, is not counted.

    Raises:
        AssertionError: the cache changes the loss, or the KL does not.
    """
    clock = time.perf_counter if on_gpu else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(rounds + 1):
        losses = {}
        for name, step in steps.items():
            start = clock()
            losses[name] = step()  # .item() waits for a GPU
            if n:
                taken[name].append(clock() - start)
        plain, computed, cached = losses.values()
        assert plain != computed, losses
        assert abs(computed - cached) < 1e-4 * abs(computed), losses
    return {name: statistics.median(times) for name, times in taken.items()}


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float32" if device == "cpu" else "auto"
    model = ULLME(options.llm, lora_r=16, lora_dropout=0.0, dtype=dtype, prompts=Prompts(query="{text}"))
    model.to(device).train()
    draws = list(enumerate(read_rows(options.rows, options.queries, options.negatives)))
    with tempfile.TemporaryDirectory() as cache:
        lengths = (options.query_max_length, options.passage_max_length)
        found = measure(make_steps(model, draws, lengths, cache), options.rounds, device == "cuda")
    print(machine())
    for name, seconds in found.items():
        print(f"{name}: {seconds:.2f} s, {seconds / found['CL']:.2f} times CL")


if __name__ == "__main__":
    main()
