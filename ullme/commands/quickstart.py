"""``ullme quickstart``: the whole job in a few minutes on two CPU cores, with nothing to download.

It generates a miniature world of facts, pre-trains a tiny Llama on its texts, trains it as an embedder by the entry
point of ``train.py``, and evaluates it before and after by that of ``evaluate.py``, on queries about entities that
neither training has seen.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ullme.utils import config_files
from ullme.utils.errors import one_line, print_error
from ullme.utils.expanded_paths import expand_paths

if TYPE_CHECKING:
    from ullme.demo.world import World

CONFIG = config_files.configs_folder() / "quickstart.yaml"
# Logged metric -> label in the plot: the loss and GRL's terms.
TERMS = {"train/loss": "total", "train/info_nce": "InfoNCE", "train/dpo": "DPO", "train/kl": "KL"}
COLORS = {"BM25": "0.7", "untrained": "C1", "trained": "C0"}


@dataclass(frozen=True)
class Scores:
    """Retrieval quality on the test queries, each between 0 and 1."""

    ndcg_at_10: float
    mrr_at_10: float
    recall_at_100: float


def parser() -> argparse.ArgumentParser:
    """The options; unknown ones are passed to train.py."""
    options = argparse.ArgumentParser(
        prog="ullme quickstart",
        description="Generate data, pre-train a tiny LLM, train it as an embedder and evaluate it before and after.",
        epilog="Further options are passed to train.py, for example --model.optimizer.lr=1e-3.",
    )
    options.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of all files")
    options.add_argument("--config", type=Path, default=CONFIG, help="training options (default: quickstart.yaml)")
    options.add_argument("--seed", type=int, default=0, help="seed of the data, the LLM and the training")
    options.add_argument("--entities", type=int, default=600, help="entities to train on, each with five facts")
    options.add_argument("--pretrain_steps", type=int, default=200, help="steps of language modelling")
    options.add_argument("--hidden_size", type=int, default=128, help="width of the LLM, a multiple of 32")
    options.add_argument("--num_layers", type=int, default=2, help="depth of the LLM")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps and print the table.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments, printed in one line.
    """
    options, training_options = parser().parse_known_args(argv)
    try:
        expand_paths(options)
        scores = run(options, training_options)
    except ValueError as error:
        return print_error(error)
    print(f"\n{table(scores)}\n\nplot: {options.output / 'quickstart.png'}")
    return 0


def run(options: argparse.Namespace, training_options: Sequence[str] = ()) -> dict[str, Scores]:
    """Run all steps in order.

    Args:
        options: of :func:`parser`.
        training_options: for train.py, after the options that this function sets.

    Returns:
        Scores on the same queries of "BM25" (if bm25s is installed), "untrained" and "trained".

    Raises:
        ValueError: an output folder with other files in it, or a missing config file.
    """
    from ullme.demo.language_model import build_backbone
    from ullme.demo.world import build_world

    output = options.output
    _check(options, training_options)
    _clear_output(output)
    # Nothing here comes from the hub, and a lookup takes long without a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    with _step("generating the data"):
        world = build_world(output / "world", options.seed, train_entities=options.entities)
    with _step("pre-training the LLM"):
        build_backbone(
            output / "llm",
            world.pretrain_file.read_text(encoding="utf-8").splitlines(),
            seed=options.seed,
            steps=options.pretrain_steps,
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
        )
    scores = {}
    with _step("ranking with BM25"):
        if bm25 := bm25_scores(world.dev_folder):
            scores["BM25"] = bm25
    with _step("evaluating the untrained embedder"):
        scores["untrained"] = evaluate(options.config, output / "llm", world, output / "eval" / "untrained")
    with _step("training"):
        train(options.config, output / "llm", world, output / "train", options.seed, training_options)
    with _step("evaluating the trained embedder"):
        scores["trained"] = evaluate(
            options.config, output / "llm", world, output / "eval" / "trained", checkpoint=output / "train"
        )
    (output / "scores.json").write_text(json.dumps({name: vars(row) for name, row in scores.items()}, indent=2))
    plot(training_terms(output / "train"), scores, output / "quickstart.png")
    return scores


def _check(options: argparse.Namespace, training_options: Sequence[str]) -> None:
    """Raises: ValueError: an option that would fail after minutes of pre-training."""
    from jsonargparse import ArgumentError

    from ullme.commands.train import read_configs

    if not options.config.is_file():
        raise ValueError(f"--config {options.config} does not exist; name a YAML file, or leave it out")
    if options.hidden_size < 32 or options.hidden_size % 32:
        raise ValueError(
            f"--hidden_size {options.hidden_size} must be a multiple of 32, the width of an attention head"
        )
    for name in ("pretrain_steps", "num_layers"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # they are a part of the command line
    try:
        read_configs([f"--config={options.config}", *training_options])
    except ArgumentError as error:
        raise ValueError(one_line(error)) from None


def train(config: Path, llm: Path, world: World, output: Path, seed: int, more: Sequence[str] = ()) -> None:
    """Train by the entry point of ``train.py fit --config configs/quickstart.yaml ...``."""
    from ullme.commands.train import main as train_main

    train_main(
        [
            "fit",
            f"--config={config}",
            f"--seed_everything={seed}",
            f"--data.seed={seed}",
            f"--model.backbone.model_name_or_path={llm}",
            f"--data.train={world.train_file}",
            f"--data.val={world.val_folder}",
            f"--trainer.default_root_dir={output}",
            f"--trainer.logger.init_args.save_dir={output}",
            *more,
        ]
    )


def evaluate(config: Path, llm: Path, world: World, output: Path, checkpoint: Path | None = None) -> Scores:
    """Evaluate by the entry point of ``evaluate.py --model LLM [--checkpoint RUN] --corpus FOLDER``.

    The untrained model gets the prompts of the config, so that it embeds the same texts as the trained one.

    Returns:
        The scores in mteb's result file.
    """
    import yaml

    from ullme.commands.evaluate import main as evaluate_main

    argv = [f"--model={llm}", "--corpus", str(world.dev_folder), f"--output={output}", "--progress=false"]
    if checkpoint is None:
        prompts = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["prompts"]
        argv += [f"--query_prompt={prompts['query']}", f"--passage_prompt={prompts['passage']}"]
    else:
        argv += [f"--checkpoint={checkpoint}"]
    if status := evaluate_main(argv):
        raise RuntimeError(f"evaluation ended with status {status}: {' '.join(argv)}")
    return _read_scores(output)


def _read_scores(folder: Path) -> Scores:
    """Read the one result file that mteb wrote below ``folder`` (its other files describe the model)."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*.json")]
    (scores,) = (result["scores"]["test"][0] for result in results if "scores" in result)
    return Scores(*(float(scores[field.name]) for field in fields(Scores)))


def bm25_scores(folder: Path) -> Scores | None:
    """BM25 (bm25s with its defaults and English stop words) on a BEIR folder with one positive for each query.

    Returns:
        The scores, or None where bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        print("BM25 is left out of the table; pip install 'ullme[bm25]' adds it")
        return None
    from ullme.data.beir import read_beir

    beir = read_beir(str(folder), "test")
    retriever = bm25s.BM25()
    retriever.index(_words(list(beir.corpus.values())), show_progress=False)
    queries = _words(list(beir.queries.values()))
    found, weights = retriever.retrieve(queries, k=min(100, len(beir.corpus)), show_progress=False)
    ranks = []
    for query_id, documents, row in zip(beir.queries, found.tolist(), weights.tolist(), strict=True):
        (positive,) = beir.qrels[query_id]
        # bm25s fills the list with documents that share no word with the query, in arbitrary order
        ranked = [beir.corpus_ids[n] for n, weight in zip(documents, row, strict=True) if weight > 0]
        ranks.append(ranked.index(positive) + 1 if positive in ranked else math.inf)
    return Scores(
        ndcg_at_10=_mean(1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks),
        mrr_at_10=_mean(1 / rank if rank <= 10 else 0.0 for rank in ranks),
        recall_at_100=_mean(float(rank <= 100) for rank in ranks),
    )


def _words(texts: list[str]) -> list[list[str]]:
    import bm25s

    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def training_terms(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Term -> (step, value) pairs, from the ``metrics.csv`` of Lightning's CSVLogger below ``folder``."""
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return {
        name: points
        for column, name in TERMS.items()
        if (points := [(int(row["step"]), float(row[column])) for row in rows if row.get(column)])
    }


def table(scores: dict[str, Scores]) -> str:
    """The scores times 100, one system a line."""
    lines = [f"{'':12}{'nDCG@10':>10}{'MRR@10':>10}{'Recall@100':>12}"]
    for name, row in scores.items():
        lines.append(f"{name:12}{100 * row.ndcg_at_10:10.1f}{100 * row.mrr_at_10:10.1f}{100 * row.recall_at_100:12.1f}")
    return "\n".join(lines)


def plot(terms: dict[str, list[tuple[int, float]]], scores: dict[str, Scores], file: Path) -> None:
    """Plot the loss and its terms over the steps, and a bar of nDCG@10 for each system, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, points in terms.items():
        left.plot(*zip(*points, strict=True), label=name)
    left.legend()
    left.set(xlabel="training step", ylabel="nats", title="Training", ylim=(0, None))
    colors = [COLORS[name] for name in scores]
    bars = right.bar(list(scores), [100 * row.ndcg_at_10 for row in scores.values()], color=colors)
    right.bar_label(bars, fmt="%.1f")
    right.set(ylabel="nDCG@10", title="Questions about unseen entities", ylim=(0, 100))
    figure.savefig(file, dpi=150)


def _clear_output(output: Path) -> None:
    """Remove the files of an earlier quickstart.

    Raises:
        ValueError: the folder has other files in it, or cannot be written.
    """
    from ullme.utils.atomic_files import check_writable

    if output.is_dir() and any(output.iterdir()):
        if not (output / "world" / "facts.jsonl").is_file():
            raise ValueError(f"--output {output} holds other files; name a new or an empty folder")
        shutil.rmtree(output)
    check_writable(output, "--output")


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Print the name of a step, and afterwards how many seconds it took."""
    print(f"== {what}", flush=True)
    start = time.perf_counter()
    yield
    print(f"== {what}: {time.perf_counter() - start:.0f} s", flush=True)
