"""Real sizes on an accelerator, in one call: training, encoding, memory, where time goes, and torch.compile.

python benchmarks/gpu.py                         # phi-1.5 on CUDA
python benchmarks/gpu.py --models mistral-7b --parts encode train profile --output results/mistral.json
python benchmarks/gpu.py --tiny --device cpu     # the same way through the code on a toy, in seconds

Weights are random, of the published shapes, in bfloat16 (speed and memory do not depend on their values); token rows
have MS MARCO's lengths, one positive and eight negatives a query; LoRA r 16 with dropout 0.2 as in configs/base.yaml.

- train: GRL steps of batch 512 through the loss callback that training uses, the chunk chosen as ``chunk_tokens: auto``
  does; with π_ref computed, and with π_ref known (an epoch after the first, or loss.cache_reference).
- encode: ``ULLME.encode`` on texts, tokeniser included.
- memory: the peak of a GRL step against the batch, chunk fixed and no graph held besides it.
- profile: the costliest kernels of a GRL step.
- compile: a contrastive step with torch.compile on and off.

MFU counts model FLOPs on real tokens (nothing recomputed, no π_ref) against the rate of a large bfloat16 product that
was measured in the same run. Every part is printed and written when it is done, memory and compile last, so a run that
is cut off leaves what it has. The package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read when torch first allocates

import torch
from machine import machine
from real_sizes import MODELS, Given, Sizes, build
from torch.profiler import ProfilerActivity, profile
from workload import make_batch, make_passages

from ullme.batch import Batch
from ullme.callbacks import GRL, GradCache
from ullme.models import ULLME
from ullme.planning.auto_chunk import Chunking, largest_chunk, shrink_until_it_fits
from ullme.planning.flops import model_cost, step_work
from ullme.planning.memory import GIB

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PARTS = ("encode", "train", "profile", "memory", "compile")
# One positive and eight negatives of at most 200 tokens, and a query: the least that a chunk with generation holds.
LEAST = 9 * 200 + 12
EPOCH_STEPS = 545


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Wall seconds, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_gib(run: Callable[[], Any], device: torch.device) -> tuple[Any, float | None]:
    """What it returns, and the most that tensors took while it ran, weights included; None without CUDA."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return run(), torch.cuda.max_memory_allocated(device) / GIB


def product_tflops(device: torch.device, n: int) -> float:
    """The rate of a bfloat16 product of two (n, n) matrices, the best of ten."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10)) / 1e12


class Trainer:
    """Steps as the LightningModule does them: gradients from a loss callback under bf16-mixed, clipping, AdamW."""

    def __init__(self, model: ULLME, loss: GradCache, chunking: Chunking) -> None:
        self.model, self.loss = model, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        loss.apply_chunking(chunking)
        self.module: Any = SimpleNamespace(
            model=model, manual_backward=torch.Tensor.backward, global_step=0, parameters=model.parameters
        )

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.model.device.type, torch.bfloat16):
            self.loss.backward(self.module, batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def settle(model: ULLME, loss: GradCache) -> Chunking:
    """What ``chunk_tokens: auto`` and ``gradient_checkpointing: auto`` would take."""
    chunking = largest_chunk(model, half=True, least=LEAST, chunk_tokens=None)
    if model.device.type == "cuda":
        autocast = partial(torch.autocast, "cuda", torch.bfloat16)
        return shrink_until_it_fits(model, loss.objective, chunking, 9, 200, autocast, queries=512)
    if chunking.checkpointing:
        model.recompute_layers()
    return chunking


def rates(model: ULLME, loss: GradCache, batch: Batch, seconds: float, peak: float) -> dict[str, float]:
    """Of one step."""
    cost = model_cost(model.causal_lm.config, model.options)
    flops = float(cost.step(step_work(batch, loss.objective, False, loss.objective.share_prompts)))
    return {
        "seconds": seconds,
        "tokens_per_second": batch.num_tokens / seconds,
        "mfu": flops / seconds / (peak * 1e12),
        "epoch_hours": EPOCH_STEPS * seconds / 3600,
    }


def train(model: ULLME, chunking: Chunking, sizes: Sizes, peak: float) -> dict[str, Any]:
    vocabulary = model.causal_lm.config.vocab_size
    batch = make_batch(sizes.batch, vocabulary=vocabulary).to(model.device)
    found: dict[str, Any] = {}
    for name, reference in (("grl", None), ("grl_reference_known", Given())):
        loss = GRL()
        if reference is not None:
            loss.objective.reference = reference
        trainer = Trainer(model, loss, chunking)
        trainer.step(batch[: sizes.small_batch])
        seconds, peak_memory = peak_gib(partial(timed, partial(trainer.step, batch), model.device), model.device)
        found[name] = {**rates(model, loss, batch, seconds, peak), "peak_gib": peak_memory}
    return found


def encode(model: ULLME, sizes: Sizes) -> dict[str, Any]:
    texts = make_passages(sizes.passages, model.causal_lm.config.vocab_size)
    model.encode(texts[: len(texts) // 8])
    seconds = timed(lambda: model.encode(texts), model.device)
    tokens = sum(len(text.split()) for text in texts)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "passages_per_second": len(texts) / seconds}


def memory(model: ULLME, chunking: Chunking, sizes: Sizes) -> dict[str, Any]:
    trainer = Trainer(model, GRL(), Chunking(chunking.chunk_tokens // 4, 0, chunking.checkpointing))
    found: dict[str, float | None] = {}
    for queries in sizes.batches:
        batch = make_batch(queries, vocabulary=model.causal_lm.config.vocab_size).to(model.device)
        found[str(queries)] = peak_gib(partial(trainer.step, batch), model.device)[1]
    return {"chunk_tokens": chunking.chunk_tokens // 4, "peak_gib": found}


def top_costs(model: ULLME, chunking: Chunking, sizes: Sizes, most: int = 12) -> list[dict[str, Any]]:
    batch = make_batch(sizes.small_batch, vocabulary=model.causal_lm.config.vocab_size).to(model.device)
    trainer = Trainer(model, GRL(), chunking)
    trainer.step(batch)
    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as record:
        trainer.step(batch)
        synchronize(model.device)
    averages = record.key_averages()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    if cuda:  # kernels alone: an operator carries the time of those that it starts
        averages = [e for e in averages if "cuda" in str(e.device_type).lower()] or averages
    total = sum(getattr(e, field) for e in averages) or 1
    costly = sorted(averages, key=lambda e: -getattr(e, field))[:most]
    return [{"kernel": e.key[:100], "share": getattr(e, field) / total, "calls": e.count} for e in costly]


def compiled(name: str, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    def steps(on: bool) -> dict[str, float]:
        model = build(name, device, sizes, compile=on)
        loss = GradCache()
        trainer = Trainer(model, loss, settle(model, loss))
        vocabulary, queries = model.causal_lm.config.vocab_size, 2 * sizes.small_batch
        batches = [make_batch(queries, vocabulary=vocabulary, seed=seed).to(device) for seed in range(3)]
        seconds = [timed(partial(trainer.step, batch), device) for batch in batches]
        return {"first_seconds": seconds[0], "seconds": seconds[-1]}

    found = {}
    for on in (False, True):
        found["on" if on else "off"] = steps(on)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def measure(name: str, parts: list[str], device: torch.device, sizes: Sizes, peak: float, keep: Callable) -> None:
    """Every part of one model; what fails is kept as its message, and the rest goes on."""

    def with_one_model() -> None:
        model = build(name, device, sizes)
        chunking = settle(model, GRL())
        keep("model", {"attention_path": model.attention_path, **vars(chunking)})
        runs: dict[str, Callable[[], Any]] = {
            "encode": lambda: encode(model, sizes),
            "train": lambda: train(model, chunking, sizes, peak),
            "profile": lambda: top_costs(model, chunking, sizes),
            "memory": lambda: memory(model, chunking, sizes),
        }
        for part, run in runs.items():
            if part in parts:
                keep(part, _or_error(run))

    if set(parts) - {"compile"}:
        with_one_model()
    if "compile" in parts:
        keep("compile", _or_error(lambda: compiled(name, device, sizes)))


def _or_error(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:  # out of memory, a kernel or a compiler that is missing
        print(f"  failed: {error}", file=sys.stderr)
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def table(results: dict[str, Any]) -> str:
    """What was asked for, in Markdown."""
    lines = ["| model | what | value |", "|---|---|---|"]
    for name, found in results["models"].items():
        for part, value in found.items():
            rows = [(part, row) for row in value] if isinstance(value, list) else _flat(part, value)
            lines += [f"| {name} | {what} | {_text(row)} |" for what, row in rows]
    return "\n".join(lines)


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
        return [row for key, inner in value.items() for row in _flat(f"{name}, {key}", inner)]
    return [(name, value)]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return str(value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["phi-1.5"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy of each family, for trying the script out")
    parser.add_argument("--output", type=Path, help="default: results/gpu.json; with --tiny nowhere")
    options = parser.parse_args(argv)
    device, sizes = torch.device(options.device), Sizes(options.tiny)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: there is no CUDA device here; --tiny --device cpu tries the script out")
    output: Path | None = options.output or (None if options.tiny else RESULTS)
    earlier = json.loads(output.read_text()) if output is not None and output.exists() else {}
    peak = product_tflops(device, sizes.product)
    results: dict[str, Any] = {
        "machine": machine(),
        "python": platform.python_version(),
        "command": " ".join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)]),
        "product_tflops": peak,
        "models": earlier.get("models", {}),
    }
    print(f"{results['machine']}\nbfloat16 product: {peak:.3g} TFLOP/s", flush=True)
    for name in options.models:

        def keep(part: str, value: Any, name: str = name) -> None:
            results["models"].setdefault(name, {})[part] = value
            print(f"  {name} {part}: {value}", flush=True)
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(results, indent=1) + "\n")

        measure(name, options.parts, device, sizes, peak, keep)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
