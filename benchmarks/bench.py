"""ULLME beside what people use now, on the same weights and texts, in one run: `make bench`, under ten minutes.

python benchmarks/bench.py [--rounds 3] [--only contrastive grl encode memory start]

One thread; CPU seconds, medians of interleaved rounds (the first round warms up and is dropped); memory in a fresh
process each. The peer runs in each of its settings and the fastest counts; beside the contrastive step stand the matrix
products alone. Writes results/bench/<processor and vector instructions>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, machine_key
from peers import features, peft_llm, plain_grl_step, sentence_transformer
from workload import (
    load_model,
    make_batch,
    make_passages,
    peak_allocated,
    peak_resident,
    reset_peak,
    resident,
    return_freed_memory,
    save_backbone,
)

from ullme.batch import Batch
from ullme.engine.gradcache import chunk_slices, microbatch_rows
from ullme.engine.objective import Objective
from ullme.engine.reference import Reference
from ullme.losses import DPO, KL, InfoNCE
from ullme.models import ULLME
from ullme.planning.auto_chunk import Chunking, largest_chunk

CHUNK_TOKENS = 512  # of a small chunk; the peer's 8 passages have about 600, padded to 1,000
# How the peer's cached loss may be cut: by rows, or by padded tokens.
PEER_SETTINGS: tuple[dict[str, int], ...] = (
    {"mini_batch_size": 8},
    {"mini_batch_size": 32},
    {"mini_batch_num_tokens": 1024},
)
CONTRASTIVE_BATCH, GRL_BATCH, PASSAGES = 32, 16, 2000
LARGEST_QUERY = 12 + 9 * 200  # tokens of a query with its candidates at most: the smallest chunk of generation
ROOT = Path(__file__).resolve().parents[1]


class Given(Reference):
    """log π_ref that is known beforehand: neither side computes it."""

    def __init__(self, logps: torch.Tensor) -> None:
        self.values = logps

    def prepare(self, model: ULLME, precision: str, likelihoods: Any = ()) -> None: ...

    def logps(self, model: ULLME, batch: Batch, mask: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.values[batch.row_ids]


def reference_logps() -> torch.Tensor:
    return torch.randn(GRL_BATCH, 9, generator=torch.Generator().manual_seed(2)) * 3 - 600


def grad_cache(
    objective: Objective, model: ULLME, batch: Batch, chunk_tokens: int = CHUNK_TOKENS, hold: bool = False
) -> float:
    """A step as :class:`ullme.callbacks.GradCache` does it; returns the loss."""
    model.zero_grad()
    chunks, microbatches = chunk_slices(batch, None, chunk_tokens), microbatch_rows(batch, chunk_tokens)
    retained = len(microbatches) if hold else 0
    return objective.grad_cache(model, batch, chunks, microbatches=microbatches, num_retained=retained)["loss"].item()


def contrastive_auto(folder: str, batch_size: int = CONTRASTIVE_BATCH) -> Callable[[], float]:
    """Our contrastive step as ``chunk_tokens: auto`` runs it here; returns its loss."""
    model, batch, objective = load_model(folder), make_batch(batch_size), Objective([InfoNCE(0.05)])
    chunking = automatic(model, batch)
    return lambda: grad_cache(objective, model, batch, chunking.chunk_tokens, hold=True)


def automatic(model: ULLME, batch: Batch) -> Chunking:
    """What ``chunk_tokens: auto`` chooses.

    Raises:
        AssertionError: this machine has too little memory to hold the graphs of this small batch.
    """
    chunking = largest_chunk(model, half=False, least=LARGEST_QUERY, chunk_tokens=None)
    assert chunking.retained_tokens >= batch.num_tokens, chunking
    return chunking


def matrix_products(folder: str, forwards: int, batch_size: int = CONTRASTIVE_BATCH) -> Callable[[], float]:
    """The linear layers' products of a contrastive step and nothing else: no LoRA, attention, norms or loss.

    Args:
        folder: of the LLM.
        forwards: 1 if graphs are held, 2 if everything is embedded twice; the gradient of the input comes once.
        batch_size: queries.
    """
    layers = load_model(folder, lora_name=None).causal_lm.base_model.layers
    weights = [m.weight.detach() for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    tokens = make_batch(batch_size).num_tokens
    values = {width: torch.randn(2048, width) for weight in weights for width in weight.shape}

    @torch.no_grad()
    def run() -> float:
        for start in range(0, tokens, 2048):
            rows = min(2048, tokens - start)
            for weight in weights:
                for _ in range(forwards):
                    torch.nn.functional.linear(values[weight.shape[1]][:rows], weight)
                values[weight.shape[0]][:rows] @ weight
        return 0.0

    return run


def contrastive(folder: str, batch_size: int = CONTRASTIVE_BATCH) -> Callable[[], float]:
    """Our contrastive step in the memory of one small chunk; returns its loss."""
    model, batch, objective = load_model(folder), make_batch(batch_size), Objective([InfoNCE(0.05)])
    return lambda: grad_cache(objective, model, batch)


def contrastive_peer(folder: str, batch_size: int = CONTRASTIVE_BATCH, setting: int = 0) -> Callable[[], float]:
    """CachedMultipleNegativesRankingLoss in one of :data:`PEER_SETTINGS`."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = sentence_transformer(folder, load_model(folder))
    columns = features(make_batch(batch_size))
    function = CachedMultipleNegativesRankingLoss(model, scale=20.0, **PEER_SETTINGS[setting])

    def step() -> float:
        model.zero_grad()
        loss = function([dict(column) for column in columns], None)
        loss.backward()
        return loss.item()

    return step


def grl_objective() -> Objective:
    return Objective([InfoNCE(0.05), DPO(weight=0.5), KL()], Given(reference_logps()))


def grl(folder: str, batch_size: int = GRL_BATCH) -> Callable[[], float]:
    """Our GRL step without its reference pass, as ``chunk_tokens: auto`` runs it here."""
    model, batch, objective = load_model(folder), make_batch(batch_size), grl_objective()
    chunking = automatic(model, batch)
    return lambda: grad_cache(objective, model, batch, chunking.chunk_tokens, hold=True)


def grl_in_chunks(folder: str, batch_size: int = GRL_BATCH) -> Callable[[], float]:
    """The same in the memory of one small chunk: everything is embedded twice, as the peer does."""
    model, batch, objective = load_model(folder), make_batch(batch_size), grl_objective()
    return lambda: grad_cache(objective, model, batch)


def grl_peer(folder: str, batch_size: int = GRL_BATCH) -> Callable[[], float]:
    """A plain padded, whole-logit GradCache step."""
    llm, batch = peft_llm(folder, load_model(folder)), make_batch(batch_size)

    def step() -> float:
        llm.zero_grad()
        return plain_grl_step(llm, batch, reference_logps()[:batch_size]).item()

    return step


def encoders(folder: str) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """(ours, sentence-transformers'), each with its own batch size."""
    model, texts = load_model(folder), make_passages(PASSAGES)
    peer = sentence_transformer(folder, model)
    return lambda: model.encode(texts), lambda: peer.encode(texts)  # type: ignore[return-value]


def compare(sides: Sequence[Callable], rounds: int, tolerance: float, beside: Sequence[Callable] = ()) -> list[float]:
    """Median CPU seconds of each side, the last of which is a peer, and then of what is measured beside them.

    Raises:
        AssertionError: the sides do not compute the same.
    """
    times: list[list[float]] = [[] for _ in [*sides, *beside]]
    for _ in range(rounds + 1):
        results = []
        for side, run in zip(times, [*sides, *beside], strict=True):
            start = time.process_time()
            results.append(np.asarray(run()))
            side.append(time.process_time() - start)
        theirs = results[len(sides) - 1]
        for ours in results[: len(sides) - 1]:
            assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
    return [statistics.median(side[1:]) for side in times]


def contrastive_rows(folder: str, rounds: int, add: Callable) -> None:
    """Both ways to run the step beside the peer's best setting and beside the matrix products."""
    settings = range(len(PEER_SETTINGS))
    sides = [contrastive_auto(folder), contrastive(folder), *(contrastive_peer(folder, setting=n) for n in settings)]
    found = compare(sides, rounds, 1e-5, [matrix_products(folder, 1), matrix_products(folder, 2)])
    ours, theirs, products = found[:2], found[2:-2], found[-2:]
    best = min(settings, key=lambda n: theirs[n])
    peers = ", ".join(f"{key} {v}: {theirs[n]:.2f}" for n in settings for key, v in PEER_SETTINGS[n].items())
    print(f"  CachedMultipleNegativesRankingLoss, CPU s: {peers}", flush=True)
    names = ("contrastive step, batch 32", "contrastive step, batch 32, embedding twice")
    for name, seconds, floor, goal in zip(names, ours, products, ("<= 0.45", "<= 0.55"), strict=True):
        detail = f"{seconds:.2f} and {theirs[best]:.2f} CPU s"
        ratio = seconds / theirs[best]
        add(name, goal, f"{ratio:.2f}", detail, ours=seconds, theirs=theirs[best], products=floor)
        above = f"{seconds:.2f} and {floor:.2f} CPU s"
        add(f"{name}, over its matrix products", "<= 1.4", f"{seconds / floor:.2f}", above, ours=seconds, floor=floor)


PARTS = ("contrastive", "grl", "encode", "memory", "start")
MEMORY = {
    "ours 32": (contrastive, 32),
    "ours 128": (contrastive, 128),
    "theirs 32": (contrastive_peer, 32),
    "grl": (grl, GRL_BATCH),
    "grl in chunks": (grl_in_chunks, GRL_BATCH),
    "grl theirs": (grl_peer, GRL_BATCH),
}


def memory_growth(name: str, folder: str) -> list[float]:
    """MB of a step above what was there before it: [what the process grew by, what PyTorch's allocator held at once].

    The process also keeps what malloc does not give back, which depends on the sizes of blocks and their order. The
    second, which takes long, is measured of contrastive steps only.
    """
    make, batch_size = MEMORY[name]
    step = make(folder, batch_size)
    make(folder, 2)()  # kernels
    return_freed_memory()
    reset_peak()
    before = resident()
    step()
    growth = peak_resident() - before
    return [growth] if name.startswith("grl") else [growth, peak_allocated(step)]


def memory_rows(folder: str, add: Callable) -> None:
    """Ours beside theirs, and the contrastive step with four times the batch."""
    growth = {n: json.loads(in_a_process(__file__, "--memory", n, folder)[0].splitlines()[-1]) for n in MEMORY}
    for n, measure in enumerate(("process", "tensors")):
        ours, theirs, larger = (growth[side][n] for side in ("ours 32", "theirs 32", "ours 128"))
        name = f"memory of a contrastive step, {measure}"
        add(name, "<= 0.3", f"{ours / theirs:.2f}", f"{ours:.0f} and {theirs:.0f} MB", ours=ours, theirs=theirs)
        detail = f"{ours:.0f} and {larger:.0f} MB"
        name = f"memory, batch 32 to 128, {measure}"
        add(name, "<= +40 MB", f"{larger - ours:+.0f} MB", detail, batch_32=ours, batch_128=larger)
    theirs = growth["grl theirs"][0]
    for side, name in (("grl", "memory of a GRL step"), ("grl in chunks", "memory of a GRL step, embedding twice")):
        ours = growth[side][0]
        add(name, "< 1", f"{ours / theirs:.2f}", f"{ours:.0f} and {theirs:.0f} MB", ours=ours, theirs=theirs)


def in_a_process(*arguments: str) -> tuple[str, float]:
    """(output, CPU seconds) of a Python process."""
    before = os.times()
    out = subprocess.run([sys.executable, *arguments], capture_output=True, check=True, text=True, cwd=ROOT)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return out.stdout, spent


def start_times() -> tuple[float, float]:
    """CPU seconds of ``train.py fit --help``, and of ``import ullme`` above Python's."""
    help_seconds = in_a_process("train.py", "fit", "--help")[1]
    bare, imported = (
        statistics.median(in_a_process("-c", code)[1] for _ in range(5)) for code in ("pass", "import ullme")
    )
    return help_seconds, imported - bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="a part leaves the others' results be")
    parser.add_argument("--memory", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(memory_growth(*options.memory)))
        return
    rows: list[tuple[str, str, str, str]] = []
    place = ROOT / "benchmarks" / "results" / "bench" / f"{machine_key()}.json"
    place.parent.mkdir(exist_ok=True)
    partly = place.exists() and set(options.only) != set(PARTS)
    results: dict[str, object] = {**(json.loads(place.read_text()) if partly else {}), "machine": machine()}

    def add(name: str, goal: str, value: str, detail: str, **numbers: float) -> None:
        rows.append((name, goal, value, detail))
        results[name] = numbers
        print(f"  {name}: {value} (goal {goal}; {detail})", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        save_backbone(folder)
        if "contrastive" in options.only:
            contrastive_rows(folder, options.rounds, add)
        if "grl" in options.only:
            sides = [make(folder) for make in (grl, grl_in_chunks, grl_peer)]
            *both, theirs = compare(sides, options.rounds, 1e-5)
            names = ("GRL step, batch 16", "GRL step, batch 16, embedding twice")
            for name, ours, goal in zip(names, both, ("<= 0.33", "<= 0.40"), strict=True):
                detail = f"{ours:.2f} and {theirs:.2f} CPU s"
                add(name, goal, f"{ours / theirs:.2f}", detail, ours=ours, theirs=theirs)
        if "encode" in options.only:
            ours, theirs = compare(encoders(folder), options.rounds, 1e-4)
            detail = f"{PASSAGES / ours:.0f} and {PASSAGES / theirs:.0f} passages a CPU s"
            add("encode 2,000 passages", ">= 1.25", f"{theirs / ours:.2f}", detail, ours=ours, theirs=theirs)
        if "memory" in options.only:
            memory_rows(folder, add)
    if "start" in options.only:
        help_seconds, imported = start_times()
        add("train.py fit --help", "<= 4 s", f"{help_seconds:.2f} s", "CPU seconds", seconds=help_seconds)
        add("import ullme", "<= 0.3 s", f"{imported:.2f} s", "above Python's own start", seconds=imported)
    print(f"\n{results['machine']}\n\n| | goal | measured | |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    place.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
