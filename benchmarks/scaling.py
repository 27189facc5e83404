"""How the cost of a step grows with the batch, the negatives, the passages' length and the vocabulary.

python benchmarks/scaling.py [--axes batch negatives "passage length" vocabulary] [--tiny]

One thread, about five minutes; every point is kept in results/scaling.json when it is done, and a run that was cut off
goes on with the points that are missing (--fresh measures all anew). The plot is results/scaling.png.

A contrastive step along the first three axes, a GRL step (no reference pass) along the fourth. `growth` is the exponent
of the cost over the whole range, against the tokens of the batch or, for the vocabulary, against its size: 1 is linear.
"""

from __future__ import annotations

import argparse
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
from ullme.engine.objective import Objective
from ullme.losses import DPO, KL, InfoNCE
from ullme.models import ULLME

RESULTS = Path(__file__).parent / "results"
AXES: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512),
    "negatives": (1, 2, 4, 8, 16),
    "passage length": (32, 64, 128, 256, 512),
    "vocabulary": (8192, 16_384, 32_768, 65_536, 131_072),
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


def measure(axis: str, value: int) -> dict[str, float]:
    """Tokens, CPU seconds (the best of two, or one where it takes long) and MB at one point."""
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(folder, value if axis == "vocabulary" else 4096)
        model = load_model(folder)
    step(axis, model, make(axis, AXES[axis][0])[:2])()  # kernels
    batch = make(axis, value)
    run = step(axis, model, batch)
    seconds = _timed(run)
    if seconds < 10:
        seconds = min(seconds, _timed(run))
    return {"value": value, "tokens": batch.num_tokens, "seconds": seconds, "mb": peak_allocated(run)}


def _timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def growth(points: list[dict[str, float]], what: str, against: str) -> float:
    """The exponent between the two ends."""
    first, last = points[0], points[-1]
    return math.log(last[what] / first[what]) / math.log(last[against] / first[against])


def plot(results: dict[str, list[dict[str, float]]], place: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(4 * len(results), 6), sharex="col", squeeze=False)
    for column, (name, points) in enumerate(results.items()):
        values = [p["value"] for p in points]
        for row, (what, label) in enumerate((("seconds", "CPU seconds"), ("mb", "MB of tensors"))):
            panel = axes[row][column]
            panel.loglog(values, [p[what] for p in points], "o-", base=2)
            if what == "seconds":
                if name != "vocabulary":
                    linear = [points[0][what] * p["tokens"] / points[0]["tokens"] for p in points]
                    panel.loglog(values, linear, "--", color="grey", base=2, label="linear in tokens")
                    panel.legend()
            else:
                panel.set_ylim(bottom=8, top=2 * max(p["mb"] for p in points))
                panel.set_xlabel(name)
            panel.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(place, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--fresh", action="store_true", help="measure anew what results/scaling.json has")
    parser.add_argument("--tiny", action="store_true", help="the first two points of each axis, for trying it out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    place = options.results / "scaling.json"
    found = json.loads(place.read_text()) if place.exists() and not options.fresh else {}
    found["machine"] = f"{machine()}, one thread"
    for axis in options.axes:
        points = found.setdefault(axis, [])
        for value in AXES[axis][: 2 if options.tiny else None]:
            if value in [point["value"] for point in points]:
                continue
            points.append(point := measure(axis, value))
            points.sort(key=lambda point: point["value"])
            tokens, seconds, mb = (point[name] for name in ("tokens", "seconds", "mb"))
            print(f"  {axis} {value}: {tokens} tokens, {seconds:.2f} CPU s, {mb:.0f} MB", flush=True)
            place.write_text(json.dumps(found, indent=1) + "\n")
    results = {axis: found[axis] for axis in AXES if len(found.get(axis, [])) > 1}
    print(f"\n{found['machine']}\n\n| axis | from | to | growth of time | growth of memory |\n|---|---|---|---|---|")
    for axis, points in results.items():
        against = "value" if axis == "vocabulary" else "tokens"
        exponents = [growth(points, what, against) for what in ("seconds", "mb")]
        ends = [f"{p['value']:,} ({p['seconds']:.2f} s, {p['mb']:.0f} MB)" for p in (points[0], points[-1])]
        print(f"| {axis} | {ends[0]} | {ends[1]} | {exponents[0]:.2f} | {exponents[1]:.2f} |")
    plot(results, options.results / "scaling.png")


if __name__ == "__main__":
    main()
