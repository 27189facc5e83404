"""The tables and plots of docs/grl_small_llm.md from the lines that grl_study.py left.

    python benchmarks/grl_report.py [--output runs/grl_study]

With the folder of the runs at hand, every run is also compared with the CL run of its seed, query by query (paired
bootstrap over queries), and the comparison is added to the lines.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 10_000


def compare(folder: Path, runs: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Difference in nDCG@10 to CL of the same seed, and the 95 % interval over queries; written once for each run."""
    same = {"steps": runs[0]["steps"], "data": runs[0].get("data")}
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "paired" and all(line[key] == same[key] for key in same)]
    known = {(line["name"], line["seed"]) for line in found}
    generator = torch.Generator().manual_seed(0)
    for run in runs:
        own, base = (
            folder / f"{n.replace(' ', '_')}-{run['steps']}-{run['seed']}.ndcg.pt" for n in (run["name"], "CL")
        )
        if run["name"] in ("CL", "untrained") or (run["name"], run["seed"]) in known:
            continue
        if not (own.is_file() and base.is_file()):
            continue
        difference = 100 * (torch.load(own, weights_only=True) - torch.load(base, weights_only=True)).double()
        picks = torch.randint(len(difference), (RESAMPLES, len(difference)), generator=generator)
        low, high = difference[picks].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        line = {
            "kind": "paired",
            "name": run["name"],
            "seed": run["seed"],
            **same,
            "difference": round(float(difference.mean()), 3),
            "low": round(low, 3),
            "high": round(high, 3),
        }
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        found.append(line)
    return found


def table(runs: list[dict[str, Any]], paired: list[dict[str, Any]]) -> str:
    """Markdown: a line for each point, seeds together."""
    points: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        points[run["name"]].append(run)
    lines = [
        "| point | nDCG@10 | minus CL of the same seed [95 % over queries] | P_rt | P_gen | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in points.items():
        scores = [run["ndcg@10"] for run in group]
        score = f"{mean(scores):.1f}" + (f" ± {stdev(scores):.1f} ({len(scores)})" if len(scores) > 1 else "")
        gaps = [p for p in paired if p["name"] == name]
        gap = ", ".join(f"{p['difference']:+.1f} [{p['low']:+.1f}, {p['high']:+.1f}]" for p in gaps)
        held = [mean(run["held_out"][kind]["mrr"] for run in group) for kind in ("cosine", "mean")]
        cpu = mean(run["train_cpu_s"] for run in group)
        lines.append(f"| {name} | {score} | {gap} | {held[0]:.3f} | {held[1]:.3f} | {cpu:.0f} |")
    return "\n".join(lines)


def plot_points(runs: list[dict[str, Any]], file: Path) -> None:
    """nDCG@10 of every run, a row for each point; lines mark the CL runs."""
    names = list(dict.fromkeys(run["name"] for run in runs if run["name"] != "untrained"))
    figure, axis = _figure(7, 1.2 + 0.3 * len(names))
    for seed in sorted({run["seed"] for run in runs}):
        own = [run for run in runs if run["seed"] == seed and run["name"] != "untrained"]
        axis.plot([r["ndcg@10"] for r in own], [names.index(r["name"]) for r in own], "o", color=f"C{seed}")
        for run in own:
            if run["name"] == "CL":
                axis.axvline(run["ndcg@10"], color=f"C{seed}", linewidth=1, label=f"CL, seed {seed}")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(-0.5, len(names) - 0.5)
    axis.invert_yaxis()
    axis.set_xlabel("nDCG@10")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def plot_rankings(diagnosis: dict[str, Any], runs: list[dict[str, Any]], file: Path) -> None:
    """Left: what the untrained LLM's scores know. Right: both rankings before and after training."""
    figure, (left, right) = _figure(10, 3.8, 2)
    labels = {
        "cosine": "cosine\n(P_rt)",
        "mean": "mean log π(p|q)\n(P_gen)",
        "sum": "sum",
        "gain_mean": "mean log π(p|q)\n− log π(p)",
    }
    for shift, (kind, name) in enumerate((("mined", "mined negatives"), ("other_topics", "other queries' positives"))):
        values = [diagnosis[kind][key]["accuracy"] for key in labels]
        places = [n + 0.4 * shift - 0.2 for n in range(len(labels))]
        left.bar_label(left.bar(places, values, 0.38, label=name), fmt="%.2f", fontsize=7)
    left.axhline(0.2, color="0.4", linestyle=":", label="chance")
    left.set_xticks(range(len(labels)), list(labels.values()), fontsize=8)
    left.set(ylabel="positive first among five", title="Untrained")
    left.legend(fontsize=8)
    names = [n for n in ("untrained", "CL", "GRL", "no KL", "no DPO", "DPO mean", "GRL_SFT") if _first(runs, n)]
    for shift, (key, name) in enumerate((("cosine", "P_rt"), ("mean", "P_gen"))):
        values = [mean(r["held_out"][key]["mrr"] for r in runs if r["name"] == n) for n in names]
        places = [n + 0.4 * shift - 0.2 for n in range(len(names))]
        right.bar_label(right.bar(places, values, 0.38, label=name, color=f"C{2 + shift}"), fmt="%.2f", fontsize=7)
    right.axhline(137 / 300, color="0.4", linestyle=":", label="chance")  # the mean of 1, 1/2, 1/3, 1/4 and 1/5
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.set(ylabel="MRR of the positive among five", title="Before and after training")
    right.set_ylim(0, 0.9)
    right.legend(fontsize=8, loc="upper left", ncols=3)
    figure.savefig(file, dpi=110)


def plot_gradients(lines: list[dict[str, Any]], file: Path) -> None:
    """Cosines between the terms' gradients and CL's, and their norms, at each adapter that was measured."""
    figure, (left, right) = _figure(10, 3.8, 2)
    terms = list(lines[0]["norms"])
    names = [term.replace(", ", "\n") for term in terms]
    for shift, line in enumerate(lines):
        label = "at " + (line["adapter"] or "fresh adapter").rsplit("-", 2)[0].replace(
            "fresh adapter", "a fresh adapter"
        )
        width = 0.8 / len(lines)
        values = [line["cosines"][f"CL|{term}"] for term in terms[1:]]
        places = [n + width * (shift - (len(lines) - 1) / 2) for n in range(len(terms))]
        left.bar(places[:-1], [mean(v) for v in values], width, yerr=[stdev(v) for v in values], label=label)
        norms = [line["norms"][term] for term in terms]
        right.bar(places, [mean(v) for v in norms], width, yerr=[stdev(v) for v in norms], label=label)
    left.axhline(0, color="0.4", linewidth=0.8)
    left.set_xticks(range(len(terms) - 1), names[1:], fontsize=8)
    left.set(title="Cosine with the gradient of CL")
    right.set_xticks(range(len(terms)), names, fontsize=8)
    right.set(title="Norm of the unweighted term's gradient", yscale="log")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def plot_terms(runs: list[dict[str, Any]], file: Path) -> None:
    """What DPO and the KL do over the steps, in the first seed."""
    figure, axes = _figure(10, 3.4, 3)
    for axis, key in zip(axes, ("dpo", "reward_accuracy", "kl"), strict=True):
        for name in ("GRL", "DPO 0.05", "DPO mean", "beta 0.01", "GRL lr 3e-4", "P_rt 0.05", "P_gen 5"):
            run = _first(runs, name)
            if run and key in run["history"]:
                values = run["history"][key]
                smooth = [mean(values[max(0, n - 2) : n + 3]) for n in range(len(values))]
                axis.plot(smooth, label=name, linewidth=1.2)
        axis.set(title=key, xlabel="step (mean of five)")
    axes[0].axhline(0.6931, color="0.4", linestyle=":")
    axes[1].axhline(0.5, color="0.4", linestyle=":")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _first(runs: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((run for run in runs if run["name"] == name), None)


def _figure(width: float, height: float, columns: int = 1) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/grl_study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "grl_study.jsonl")
    parser.add_argument("--steps", type=int, default=30, help="runs of so many steps")
    parser.add_argument("--data", help="of the rows of this name (grl_study.py --data)")
    options = parser.parse_args()
    lines = [json.loads(text) for text in options.results.read_text().splitlines()]
    lines = [line for line in lines if line.get("steps") == options.steps and line.get("data") == options.data]
    runs = [line for line in lines if line["kind"] == "run"]
    if not runs:
        parser.error(f"--steps {options.steps} --data {options.data}: {options.results} holds no such run")
    print(table(runs, compare(options.output, runs, options.results)))
    stem = f"grl_{options.data}" if options.data else "grl"
    plot_points(runs, RESULTS / f"{stem}_points.png")
    plot_terms(runs, RESULTS / f"{stem}_terms.png")
    if diagnosis := next((line for line in lines if line["kind"] == "diagnosis"), None):
        plot_rankings(diagnosis, runs, RESULTS / f"{stem}_rankings.png")
    if gradients := [line for line in lines if line["kind"] == "gradients"]:
        plot_gradients(gradients, RESULTS / f"{stem}_gradients.png")


if __name__ == "__main__":
    main()
