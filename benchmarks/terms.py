"""The loss terms of a table's trainings, step by step: a line for each row, the mean of its seeds.

    python benchmarks/terms.py runs/small/llm --output benchmarks/results/small/terms.png

It reads the metrics.csv that `ullme reproduce` leaves in each cell of one LLM.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import fmean

TERMS = ("info_nce", "sft", "dpo", "kl", "reward_accuracy", "rank_agreement")
SMOOTHED = 5  # steps


def curve(row: Path, term: str) -> dict[int, float]:
    """Step -> mean over seeds."""
    found: dict[int, list[float]] = {}
    for file in sorted(row.glob("seed*/train/metrics.csv")):
        with file.open(newline="", encoding="utf-8") as lines:
            for line in csv.DictReader(lines):
                if line.get(f"train/{term}"):
                    found.setdefault(int(line["step"]), []).append(float(line[f"train/{term}"]))
    return {step: fmean(values) for step, values in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of one LLM in a table's output")
    parser.add_argument("--rows", nargs="+", default=["bi_cl", "bi_cl_sft", "grl_sft", "grl"])
    parser.add_argument("--output", type=Path, default=Path("terms.png"))
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, term in zip(axes.flat, TERMS, strict=True):
        for row in options.rows:
            values = list(curve(options.folder / row, term).values())
            smooth = [fmean(values[max(0, n - SMOOTHED // 2) : n + SMOOTHED // 2 + 1]) for n in range(len(values))]
            if smooth:
                axis.plot(smooth, label=row, alpha=0.8)
        axis.set(title=term, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
