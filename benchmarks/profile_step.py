"""Where the time of a contrastive step on a CPU goes, beside the products of its linear layers.

python benchmarks/profile_step.py [--queries 16]      # one thread, about a minute on an idle machine

Kernels are timed by torch.profiler and told apart by name and shapes. Its clock is wall time, so on a busy machine only
shares count; the CPU seconds come from a run without the profiler. The rest is Python, autograd, allocation and small
kernels, the profiler's own cost included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import CHUNK_TOKENS, automatic, grad_cache, matrix_products
from machine import machine
from torch.profiler import ProfilerActivity, profile
from workload import HEADS, HIDDEN, INTERMEDIATE, load_model, make_batch, save_backbone

from ullme.engine.objective import Objective
from ullme.losses import InfoNCE

RANK, HEAD_DIM = 16, HIDDEN // HEADS  # the rank of workload.load_model
PARTS = (
    *("products of frozen weights", "LoRA's products", "W + s B A", "attention", "SiLU and its product", "rotary"),
    *("norms", "sums: residuals and gradients", "copies of rows", "the rest"),
)


def part(name: str, shapes: list[list[int]]) -> str:
    """Which of :data:`PARTS` a kernel belongs to.

    Args:
        name: of the operation.
        shapes: of its arguments; [] for an argument that is no tensor.
    """
    tensors = [shape for shape in shapes if shape]
    widths = {size for shape in tensors for size in shape[-1:]}
    if not name.startswith("aten::"):
        return PARTS[-1]
    operation = name.removeprefix("aten::").rstrip("_")
    if operation in ("mm", "addmm"):
        if not any(RANK in shape for shape in tensors):
            return "products of frozen weights"
        return "W + s B A" if operation == "addmm" else "LoRA's products"
    if "scaled_dot_product" in operation or operation == "_softmax":
        return "attention"
    if operation in ("silu", "silu_backward") or (operation == "mul" and INTERMEDIATE in widths):
        return "SiLU and its product"
    if operation in ("mul", "neg", "addcmul", "add") and widths & {HEAD_DIM, HEAD_DIM // 2}:
        return "rotary"
    if operation in ("linalg_vector_norm", "linalg_vecdot", "square", "rsqrt", "addcmul") or (
        operation in ("mul", "div", "sum") and any(shape[0] == 1 and len(shape) == 3 for shape in tensors)
    ):
        return "norms"
    if operation in ("add", "sub"):
        return "sums: residuals and gradients"
    if operation in ("cat", "index_select", "index_copy", "index", "copy", "fill", "clone", "repeat_interleave"):
        return "copies of rows"
    return PARTS[-1]


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """The share of each part in a profile of ``step``; they sum to 1."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        start = time.perf_counter()
        step()
        elapsed = (time.perf_counter() - start) * 1e6
    found = dict.fromkeys(PARTS, 0.0)
    for event in record.key_averages(group_by_input_shape=True):
        found[part(event.key, event.input_shapes)] += event.self_cpu_time_total
    kernels = sum(found[name] for name in PARTS[:-1])
    found[PARTS[-1]] = max(0.0, elapsed - kernels)
    return {name: value / sum(found.values()) for name, value in found.items()}


def cpu_seconds(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the table; returns the CPU seconds of each part by way to run the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=16, help="with nine candidates each")
    queries = parser.parse_args(argv).queries
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(folder)
        model, batch, objective = load_model(folder), make_batch(queries), Objective([InfoNCE(0.05)])
        held = automatic(model, batch).chunk_tokens
        ways: dict[str, tuple[Callable[[], float], int]] = {
            "graphs held": (lambda: grad_cache(objective, model, batch, held, hold=True), 1),
            "embedding twice": (lambda: grad_cache(objective, model, batch, CHUNK_TOKENS), 2),
        }
        for name, (step, forwards) in ways.items():
            floor = matrix_products(folder, forwards, queries)
            step()
            seconds, products = cpu_seconds(step), cpu_seconds(floor)
            found[name] = {key: share * seconds for key, share in shares(step).items()}
            found[name] |= {"whole step": seconds, "the products alone": products}
    print(f"{machine()}, one thread, {queries} queries\n\n| CPU s | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for key in (*PARTS, "whole step", "the products alone"):
        print(f"| {key} | {' | '.join(f'{values[key]:.2f}' for values in found.values())} |")
    return found


if __name__ == "__main__":
    main()
