"""What the generation branch costs: memory against the vocabulary, and a GRL step part by part beside its FLOPs.

python benchmarks/generation.py            # both, on one CPU thread, about two minutes
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from workload import HIDDEN, INTERMEDIATE, LAYERS, make_batch, make_model, peak_resident, reset_peak, resident

from ullme.engine.gradcache import chunk_slices, embed_batch
from ullme.engine.objective import Objective
from ullme.engine.scoring import embedder, score
from ullme.losses import DPO, KL, InfoNCE
from ullme.models import likelihood

VOCABULARIES = (8192, 32_000, 128_256)


def memory_growth(vocabulary: int) -> float:
    """MB that a DPO step on 8 queries with 9 candidates takes above the loaded model (Linux: peak resident set)."""
    model = make_model(vocabulary)
    batch = make_batch(8, vocabulary=vocabulary)
    objective = Objective([DPO()])
    objective.full_batch(model, make_batch(1, 1, vocabulary))  # kernels and LoRA gradients are there
    reset_peak()
    before = resident()
    objective.full_batch(model, batch)
    return peak_resident() - before


def parts() -> list[tuple[str, float, float]]:
    """(part, CPU seconds, GFLOP) of a GRL step on 16 queries with 9 candidates in chunks of 8 queries."""
    vocabulary = 4096
    model, batch = make_model(vocabulary), make_batch(16)
    chunks = [batch[s] for s in chunk_slices(batch, 8, None)]
    everything = [torch.ones_like(c.passage_keys, dtype=torch.bool) for c in chunks]
    assert batch.generation is not None
    embedded, answers = batch.num_tokens, batch.generation.targets.num_tokens
    generated = batch.generation.prompts.num_tokens + answers - len(batch.passages)  # last tokens predict nothing
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
    lora = 16 * (8 * HIDDEN + 3 * (HIDDEN + INTERMEDIATE))
    forward, adapters = 2 * LAYERS * layer / 1e9, 2 * LAYERS * lora / 1e9
    # frozen weights have no gradient, so backward is one product there; LoRA's has two
    per_token = {"forward": forward + adapters, "backward": forward + 2 * adapters, "reference": forward}
    head = 2 * HIDDEN * vocabulary / 1e9
    embed = embedder(model)

    def graph(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
        start = time.process_time()
        value = run()
        middle = time.process_time()
        value.backward()
        model.zero_grad()
        return middle - start, time.process_time() - middle

    def without_gradient(run: Callable[[], object]) -> float:
        start = time.process_time()
        with torch.no_grad():
            run()
        return time.process_time() - start

    def reference() -> None:
        with model.adapters_off():
            for c, m in zip(chunks, everything, strict=True):
                score(model, c, m, True)

    def lm_head() -> None:
        states, ids = torch.randn(answers, HIDDEN), torch.randint(0, vocabulary, (answers,))
        likelihood.token_log_probabilities(model.causal_lm, states, ids)

    rounds: dict[str, list[float]] = {}
    for _ in range(4):
        timed = {"embed, no gradient": without_gradient(lambda: [embed_batch(embed, c) for c in chunks])}
        f, b = zip(*(graph(lambda c=c: embed_batch(embed, c).passages.sum()) for c in chunks), strict=True)
        timed |= {"embed again": sum(f), "embed backward": sum(b)}
        f, b = zip(
            *(
                graph(lambda c=c, m=m: score(model, c, m, True)[0].sum())
                for c, m in zip(chunks, everything, strict=True)
            ),
            strict=True,
        )
        timed |= {"generation forward": sum(f), "generation backward": sum(b)}
        timed["reference"] = without_gradient(reference)
        timed["of these, LM head forward"] = without_gradient(lm_head)
        timed["whole step"] = _step(model, batch)
        timed["contrastive step"] = _step(model, batch, contrastive=True)
        for name, seconds in timed.items():
            rounds.setdefault(name, []).append(seconds)
    flops = {
        "embed, no gradient": embedded * per_token["forward"],
        "embed again": embedded * per_token["forward"],
        "embed backward": embedded * per_token["backward"],
        "generation forward": generated * per_token["forward"] + answers * head,
        "generation backward": generated * per_token["backward"] + 2 * answers * head,
        "reference": generated * per_token["reference"] + answers * head,
        "of these, LM head forward": answers * head,
    }
    flops["whole step"] = sum(v for k, v in flops.items() if not k.startswith("of these"))
    flops["contrastive step"] = embedded * (2 * per_token["forward"] + per_token["backward"])
    return [(name, statistics.median(rounds[name][1:]), flops[name]) for name in rounds]


def _step(model: torch.nn.Module, batch: object, contrastive: bool = False) -> float:
    objective = Objective([InfoNCE()] if contrastive else [InfoNCE(), DPO(weight=0.5), KL()])
    start = time.process_time()
    objective.grad_cache(model, batch, chunk_slices(batch, 8, None))  # type: ignore[arg-type]
    model.zero_grad()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 3 and sys.argv[1] == "memory":
        print(memory_growth(int(sys.argv[2])))
        return
    growth = {}
    for vocabulary in VOCABULARIES:  # a fresh process each, or one would inherit the other's heap
        command = [sys.executable, __file__, "memory", str(vocabulary)]
        growth[vocabulary] = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    print(f"{machine()}, one thread\n")
    print("| vocabulary | memory over the weights (MB) | ratio |\n|---|---|---|")
    for vocabulary, megabytes in growth.items():
        print(f"| {vocabulary:,} | {megabytes:.0f} | {megabytes / growth[VOCABULARIES[0]]:.2f} |")
    print("\n| part of a GRL step | CPU s | GFLOP | GFLOP/s |\n|---|---|---|---|")
    table = parts()
    for name, seconds, flop in table:
        print(f"| {name} | {seconds:.2f} | {flop:.1f} | {flop / seconds:.0f} |")
    results = Path(__file__).parent / "results" / "generation.json"
    results.write_text(json.dumps({"memory_mb": growth, "parts": table, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
