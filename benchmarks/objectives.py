"""Train every objective on the same data with several seeds, evaluate each, and write one table.

Trains through train.py and evaluates through evaluate.py, both as subprocesses, so every figure can be had by hand:

    python benchmarks/objectives.py --model FOLDER --train train.jsonl --corpus BEIR_FOLDER ... --output runs/objectives

Runs whose result is there are not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("base.yaml", "strategy/cpu.yaml", "small.yaml")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the LLM")
    parser.add_argument("--train", required=True, help="training rows")
    parser.add_argument("--corpus", nargs="+", required=True, help="BEIR folders to evaluate on")
    parser.add_argument("--losses", nargs="+", default=["contrastive", "cl_sft", "grl_sft", "grl"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a passage, in training and evaluation")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives"))
    return parser.parse_args()


def run(options: argparse.Namespace, loss: str | None, seed: int) -> dict[str, float]:
    """Train (unless loss is None) and evaluate; main scores by task, times 100."""
    folder = options.output / (f"{loss}-{seed}" if loss else "untrained")
    scores = folder / "scores.json"
    if not scores.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if loss:
            _call(folder / "train.log", train_command(options, loss, seed, folder))
        _call(folder / "eval.log", evaluate_command(options, folder if loss else None))
        scores.write_text(json.dumps(_scores((folder / "eval.log").read_text())))
    return json.loads(scores.read_text())


def train_command(options: argparse.Namespace, loss: str, seed: int, folder: Path) -> list[str]:
    configs = [f"--config={ROOT / 'configs' / c}" for c in (*CONFIGS, f"loss/{loss}.yaml")]
    logger = "--trainer.logger.init_args"
    return [
        *("train.py", "fit", *configs, f"--seed_everything={seed}", f"--data.seed={seed}"),
        *(f"--model.backbone.model_name_or_path={options.model}", f"--data.train={options.train}"),
        *(f"--data.batch_size={options.batch_size}", f"--data.passage_max_length={options.max_length}"),
        *(f"--trainer.max_steps={options.steps}", "--trainer.val_check_interval=null", "--trainer.log_every_n_steps=1"),
        *("--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"),
        *(f"{logger}.save_dir={folder}", f"{logger}.name=", f"{logger}.version="),
    ]


def evaluate_command(options: argparse.Namespace, checkpoint: Path | None) -> list[str]:
    trained = [f"--checkpoint={checkpoint}"] if checkpoint else ["--query_prompt={text}"]
    return [
        *("evaluate.py", f"--model={options.model}", *trained, "--dtype=bfloat16"),
        *(f"--max_length={options.max_length}", "--progress=false", f"--output={options.output / 'results'}"),
        *("--corpus", *options.corpus),
    ]


def _call(log: Path, arguments: list[str]) -> None:
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"failed, see {log}: {' '.join(arguments)}")


def _scores(log: str) -> dict[str, float]:
    """The task rows of evaluate.py's table."""
    rows = [line.split() for line in log.splitlines() if " Retrieval " in line]
    return {row[0].rsplit("-", 1)[0]: float(row[-1]) for row in rows}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over seeds of each task's main score."""
    tasks = list(next(iter(results.values()))[0])
    lines = ["| objective | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name, runs in results.items():
        cells = [
            f"{mean(r[t] for r in runs):.1f}" + (f" ± {stdev(r[t] for r in runs):.1f}" if len(runs) > 1 else "")
            for t in tasks
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(options: argparse.Namespace) -> None:
    """Every logged term of the first seed's runs against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("info_nce", "sft", "dpo", "kl", "reward_accuracy", "rank_agreement")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    for loss in options.losses:
        with (options.output / f"{loss}-{options.seeds[0]}" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        for axis, name in zip(axes.flat, names, strict=True):
            points = [(int(r["step"]), float(r[f"train/{name}"])) for r in rows if r.get(f"train/{name}")]
            if points:
                axis.plot(*zip(*points, strict=True), label=loss, alpha=0.8)
            axis.set_title(name)
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.output / "terms.png", dpi=110)


def main() -> None:
    options = parse()
    options.output = options.output.resolve()
    jobs = [(None, 0), *((loss, seed) for seed in options.seeds for loss in options.losses)]
    with ThreadPoolExecutor(options.parallel) as pool:
        done = list(pool.map(lambda job: (job[0] or "untrained", run(options, *job)), jobs))
    results: dict[str, list[dict[str, float]]] = {}
    for name, scores in done:
        results.setdefault(name, []).append(scores)
    text = table(results)
    (options.output / "table.md").write_text(text + "\n")
    plot(options)
    print(text)


if __name__ == "__main__":
    main()
