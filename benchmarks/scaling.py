"""How the cost of a step grows with the batch, the negatives, the passages' length and the vocabulary.

python benchmarks/scaling.py        # one thread, about six minutes; writes results/scaling.json and scaling.png

A contrastive step along the first three axes, a GRL step (no reference pass) along the fourth. `growth` is the exponent
of the cost over the whole range, against the tokens of the batch or, for the vocabulary, against its size: 1 is linear.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import Given, grad_cache
from machine import machine
from workload import load_model, make_batch, peak_allocated, save_backbone

from ullme.batch import Batch
from ullme.losses import DPO, KL, InfoNCE
from ullme.models import ULLME
from ullme.objective import Objective

RESULTS = Path(__file__).parent / "results"
AXES: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512),
    "negatives": (1, 2, 4, 8, 16),
    "passage length": (32, 64, 128, 256, 512),
    "vocabulary": (8192, 32_768, 131_072),
}


def make(axis: str, value: int) -> Batch:
    """The batch at one point of an axis."""
    if axis == "batch":
        return make_batch(value, negatives=1)
    if axis == "negatives":
        return make_batch(16, negatives=value)
    if axis == "passage length":
        return make_batch(8, negatives=3, passage_tokens=value)
    return make_batch(8, negatives=3, vocabulary=value)


def step(axis: str, model: ULLME, batch: Batch) -> Callable[[], float]:
    if axis == "vocabulary":
        reference = Given(torch.zeros(len(batch), len(batch.passages) // len(batch)))
        return lambda: grad_cache(Objective([InfoNCE(), DPO(weight=0.5), KL()], reference), model, batch)
    return lambda: grad_cache(Objective([InfoNCE()]), model, batch)


def measure(axis: str) -> list[dict[str, float]]:
    """Tokens, CPU seconds (the best of three) and MB at each point."""
    points = []
    for value in AXES[axis]:
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(folder, value if axis == "vocabulary" else 4096)
            model = load_model(folder)
        batch = make(axis, value)
        run = step(axis, model, batch)
        run()
        seconds = min(_timed(run) for _ in range(3))
        points.append({"value": value, "tokens": batch.num_tokens, "seconds": seconds, "mb": peak_allocated(run)})
        print(
            f"  {axis} {value}: {batch.num_tokens} tokens, {seconds:.2f} CPU s, {points[-1]['mb']:.0f} MB", flush=True
        )
    return points


def _timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def growth(points: list[dict[str, float]], what: str, against: str) -> float:
    """The exponent between the two ends."""
    first, last = points[0], points[-1]
    return math.log(last[what] / first[what]) / math.log(last[against] / first[against])


def plot(results: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(4 * len(results), 6), sharex="col")
    for column, (name, points) in enumerate(results.items()):
        values = [p["value"] for p in points]
        for row, (what, label) in enumerate((("seconds", "CPU seconds"), ("mb", "MB of tensors"))):
            panel = axes[row][column]
            panel.loglog(values, [p[what] for p in points], "o-", base=2)
            if what == "seconds":
                linear = [points[0][what] * p["tokens"] / points[0]["tokens"] for p in points]
                if name != "vocabulary":
                    panel.loglog(values, linear, "--", color="grey", base=2, label="linear in tokens")
                    panel.legend()
            else:
                panel.set_ylim(bottom=8, top=2 * max(p["mb"] for p in points))
                panel.set_xlabel(name)
            panel.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(RESULTS / "scaling.png", dpi=100)


def main() -> None:
    torch.set_num_threads(1)
    results = {axis: measure(axis) for axis in AXES}
    print(
        f"\n{machine()}, one thread\n\n| axis | from | to | growth of time | growth of memory |\n|---|---|---|---|---|"
    )
    for axis, points in results.items():
        against = "value" if axis == "vocabulary" else "tokens"
        exponents = [growth(points, what, against) for what in ("seconds", "mb")]
        ends = [f"{p['value']:,} ({p['seconds']:.2f} s, {p['mb']:.0f} MB)" for p in (points[0], points[-1])]
        print(f"| {axis} | {ends[0]} | {ends[1]} | {exponents[0]:.2f} | {exponents[1]:.2f} |")
    (RESULTS / "scaling.json").write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    plot(results)


if __name__ == "__main__":
    main()
