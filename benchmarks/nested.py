"""Retrieval against the size of an embedding: CL with and without Matryoshka, truncated and quantised.

    python benchmarks/nested.py --model FOLDER --data FOLDER [--seeds 0 1 2] [--corpora msmarco/dev trec-dl19]

Trains an adapter with InfoNCE (CL, contrastive learning) and one with Matryoshka around it, on the same batches, embeds
each corpus once, and scores its embeddings at every width in float32, int8 and binary. Leaves a line for each training
and corpus in results/nested.jsonl, and draws results/nested.png. What has its line there is not done again.

int8 has the ranges of the corpus for queries and documents; similarities are of the numbers that the steps stand for.
binary keeps signs; the similarity is the number of equal signs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import machine
from torch import Tensor
from torch.nn.functional import normalize

from ullme.data.beir import read_beir
from ullme.data.datamodule import ULLMEDataModule
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.losses import InfoNCE, Matryoshka, RepresentationLoss
from ullme.losses.matryoshka import truncated
from ullme.models import ULLME
from ullme.prompts import Prompts
from ullme.training.retrieval_metrics import retrieval_metrics

LOSSES = ("CL", "CL + Matryoshka")
STYLES = {"float32": "-", "int8": "--", "binary": ":"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the LLM")
    parser.add_argument("--data", type=Path, required=True, help="folder with the training rows and the corpora")
    parser.add_argument("--train", default="msmarco/train.jsonl", help="training rows, in --data")
    parser.add_argument("--corpora", nargs="+", default=["msmarco/dev"], help="BEIR folders to evaluate on, in --data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dims", nargs="+", type=int, help="below the hidden size (default: a half, quarter, eighth)")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a passage, in training and evaluation")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "nested.jsonl")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, seed: int) -> ULLME:
    """The LLM with a fresh adapter, as configs/small.yaml has it."""
    torch.manual_seed(seed)
    prompts = Prompts(query="{text}", passage="{text}")
    return ULLME(options.model, lora_r=16, lora_alpha=32, lora_dropout=0.0, dtype="float32", prompts=prompts).train()


def train(options: argparse.Namespace, model: ULLME, loss: RepresentationLoss, seed: int) -> list[float]:
    """AdamW with a linear schedule and a tenth of the steps of warm-up, as train.py; the loss by step."""
    from transformers import get_scheduler

    objective = Objective([loss])
    objective.check(model, options.negatives)
    model.matryoshka_dims = objective.matryoshka_dims
    data = ULLMEDataModule(
        train=str(options.data / options.train),
        num_hard_negatives=options.negatives,
        batch_size=options.batch_size,
        query_max_length=32,
        passage_max_length=options.max_length,
        num_workers=0,
        seed=seed,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, options.steps // 10, options.steps)
    history: list[float] = []
    while len(history) < options.steps:
        for batch in data.train_dataloader_for(model.prompt_tokenizer):
            optimizer.zero_grad()
            logs = objective.grad_cache(model, batch, chunk_slices(batch, options.batch_size, None))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            history.append(round(float(logs["loss"]), 4))
            if len(history) == options.steps:
                break
    return history


def quantised(queries: Tensor, corpus: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(Q, D) and (P, D) unit vectors that stand for quantised embeddings, with cosines as similarities."""
    if precision == "float32":
        return queries, corpus
    if precision == "binary":
        return normalize((queries > 0) * 2.0 - 1), normalize((corpus > 0) * 2.0 - 1)
    from sentence_transformers.util import quantize_embeddings

    low, high = corpus.amin(0), corpus.amax(0)
    ranges = torch.stack([low, high]).numpy()

    def steps(x: Tensor) -> Tensor:
        found = torch.from_numpy(quantize_embeddings(x.numpy(), "uint8", ranges=ranges)).float()
        return normalize(low + (found + 0.5) * (high - low) / 255)

    return steps(queries), steps(corpus)


def evaluate(options: argparse.Namespace, model: ULLME, corpus: Path, dims: list[int]) -> dict[str, dict[str, float]]:
    """Width -> precision -> nDCG@10, times 100."""
    beir = read_beir(corpus, "test")
    place = {name: n for n, name in enumerate(beir.corpus)}
    relevant = [{place[doc]: grade for doc, grade in beir.qrels[query].items()} for query in beir.queries]
    own = [place[query] if query in beir.own_copies else None for query in beir.queries]
    encode: dict[str, Any] = {"max_length": options.max_length, "convert_to_tensor": True}
    queries = model.encode(list(beir.queries.values()), role="query", **encode)
    documents = model.encode(list(beir.corpus.values()), role="passage", **encode)
    scores: dict[str, dict[str, float]] = {}
    for dim in dims:
        small = truncated(torch.as_tensor(queries), dim), truncated(torch.as_tensor(documents), dim)
        for precision in STYLES:
            found = retrieval_metrics(*quantised(*small, precision), relevant, own)
            scores.setdefault(str(dim), {})[precision] = round(100 * found["ndcg@10"], 2)
    return scores


def run(options: argparse.Namespace, name: str, seed: int, corpora: list[str]) -> list[dict[str, Any]]:
    """Train, and evaluate on each corpus: the scores, the first and last loss, and the seconds."""
    model = build(options, seed)
    dims = options.dims or [model.hidden_size // n for n in (2, 4, 8)]
    loss = InfoNCE() if name == "CL" else Matryoshka(InfoNCE(), dims)
    started = time.process_time()
    history = train(options, model, loss, seed)
    seconds = round(time.process_time() - started, 1)
    common = {"train_cpu_s": seconds, "loss_by_step": history, "machine": machine()}
    widths = [model.hidden_size, *dims]
    return [{"ndcg@10": evaluate(options, model, options.data / corpus, widths), **common} for corpus in corpora]


def bytes_of(dim: int, precision: str) -> float:
    """Bytes of a vector."""
    return dim * {"float32": 4, "int8": 1, "binary": 1 / 8}[precision]


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """nDCG@10 (left axis; the mean over seeds) and bytes of a vector (right axis, grey) against dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    corpora = list(dict.fromkeys(line["corpus"] for line in lines))
    figure, axes = plt.subplots(1, len(corpora), figsize=(6 * len(corpora), 4.5), layout="constrained", squeeze=False)
    for axis, corpus in zip(axes[0], corpora, strict=True):
        sizes = axis.twinx()
        for color, name in zip(("tab:blue", "tab:orange"), LOSSES, strict=True):
            found = [line["ndcg@10"] for line in lines if (line["corpus"], line["loss"]) == (corpus, name)]
            if not found:
                continue
            dims = sorted(map(int, found[0]))
            for precision, style in STYLES.items():
                means = [fmean(scores[str(dim)][precision] for scores in found) for dim in dims]
                axis.plot(dims, means, style, color=color, marker="o", ms=4, label=f"{name}, {precision}")
                sizes.plot(dims, [bytes_of(dim, precision) for dim in dims], style, color="0.8", zorder=0)
        axis.set(xlabel="dimensions", ylabel="nDCG@10", title=f"{corpus}, {len(found)} seed(s)")
        axis.set_xscale("log", base=2)
        axis.set_xticks(dims, [str(dim) for dim in dims])
        sizes.set_yscale("log", base=2)
        sizes.set_ylabel("bytes of a vector (grey)")
        axis.set_zorder(sizes.get_zorder() + 1)
        axis.patch.set_visible(False)
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=110)


def table(lines: list[dict[str, Any]]) -> str:
    """A row in Markdown for each corpus, width and precision; means over seeds."""
    rows = ["| corpus | dimensions | precision | bytes | CL | CL + Matryoshka |", "|---|---|---|---|---|---|"]
    for corpus in dict.fromkeys(line["corpus"] for line in lines):
        of_corpus = [line for line in lines if line["corpus"] == corpus]
        for dim in of_corpus[0]["ndcg@10"]:
            for precision in STYLES:
                cells = []
                for name in LOSSES:
                    found = [line["ndcg@10"][dim][precision] for line in of_corpus if line["loss"] == name]
                    cells.append(f"{fmean(found):.1f}" if found else "")
                size = f"{bytes_of(int(dim), precision):g}"
                rows.append(f"| {corpus} | {dim} | {precision} | {size} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "negatives", "max_length", "lr")}
    settings |= {"llm": Path(options.model).name, "dims": options.dims}
    lines = [json.loads(text) for text in options.results.read_text().splitlines()] if options.results.is_file() else []
    lines = [line for line in lines if line["settings"] == settings]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in LOSSES:
            done = [line["corpus"] for line in lines if (line["loss"], line["seed"]) == (name, seed)]
            if not (corpora := [corpus for corpus in options.corpora if corpus not in done]):
                continue
            for corpus, found in zip(corpora, run(options, name, seed, corpora), strict=True):
                lines.append({"loss": name, "seed": seed, "corpus": corpus, "settings": settings, **found})
                with options.results.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    draw(lines, options.results.with_suffix(".png"))
    print(table(lines))


if __name__ == "__main__":
    main()
