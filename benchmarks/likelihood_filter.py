"""Does the likelihood filter of ``ullme mine`` drop false negatives? An independent teacher judges.

    ullme mine --rows rows.jsonl --corpus CORPUS --method bm25 --num_negatives 3 --likelihood LLM --to mined.jsonl
    python benchmarks/teacher_scores.py --teacher MODEL --rows mined.jsonl --output scored.jsonl
    python benchmarks/likelihood_filter.py scored.jsonl --margins 0 0.1 0.5

A negative counts as false if its cosine is at least ``--ratio`` of the positive's. For each margin: the share of
negatives that ``--likelihood_margin`` drops, the share of false ones among the dropped and among the kept, and the 95 %
interval of the difference by a bootstrap over rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

RESAMPLES = 2000


def read(file: Path, ratio: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each row's N negatives: (N,) how far the likelihood is above the positive's, and (N,) which are false."""
    gaps, false = [], []
    for line in file.read_bytes().splitlines():
        row = json.loads(line)
        gaps.append(np.array(row["neg_likelihoods"]) - row["pos_likelihoods"][0])
        false.append(np.array(row["neg_scores"]) >= ratio * row["pos_scores"][0])
    return gaps, false


def shares(gaps: Sequence[np.ndarray], false: Sequence[np.ndarray], margin: float) -> tuple[float, float, float]:
    """The share of dropped negatives, and of false ones among the dropped and the kept (nan of none)."""
    dropped, wrong = np.concatenate(gaps) > -margin, np.concatenate(false)
    of = [wrong[place].mean() if place.any() else np.nan for place in (dropped, ~dropped)]
    return float(dropped.mean()), float(of[0]), float(of[1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--margins", type=float, nargs="+", default=[0.0, 0.1, 0.5], help="in nats a token")
    parser.add_argument("--ratio", type=float, default=0.95)
    options = parser.parse_args(argv)
    gaps, false = read(options.rows, options.ratio)
    print(f"{len(gaps)} rows, {sum(map(len, gaps))} negatives, {int(np.concatenate(false).sum())} false")
    for margin in options.margins:
        rng = np.random.default_rng(0)
        differences = []
        for _ in range(RESAMPLES):
            drawn = rng.integers(0, len(gaps), len(gaps))
            _, of_dropped, of_kept = shares([gaps[n] for n in drawn], [false[n] for n in drawn], margin)
            differences.append(of_dropped - of_kept)
        low, high = np.nanpercentile(differences, [2.5, 97.5])
        dropped, of_dropped, of_kept = shares(gaps, false, margin)
        print(
            f"margin {margin:g}: {dropped:.1%} dropped; false: {of_dropped:.1%} of the dropped, {of_kept:.1%} of the "
            f"kept, difference [{low:.1%}, {high:.1%}]"
        )


if __name__ == "__main__":
    main()
