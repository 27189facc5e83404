"""Why GRL does not beat plain contrastive learning on a small LLM: one factor at a time around a base point.

Every run trains on the same rows (those of its seed), embeds a BEIR folder once, and leaves one JSON line with its
settings, its nDCG@10, its terms by step, its CPU seconds, and how well its two rankings do on held-out rows. A run
whose line is there is not done again.

    python benchmarks/grl_study.py --model FOLDER --train msmarco/train.jsonl --corpus msmarco/dev
    python benchmarks/grl_study.py ... --seeds 1 2 --points CL GRL
    python benchmarks/grl_study.py ... --diagnose      # no training: what P_gen knows, and the terms' gradients
    python benchmarks/grl_report.py                    # the table and the plots of docs/grl_small_llm.md
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from grl_diagnosis import autocast, dependence, gradients, rankings, scores, sharpness, shifted
from grl_points import BASE, POINTS, GainKL, make_terms
from machine import machine
from torch import Tensor

from ullme.batch import Batch
from ullme.data.beir import read_beir
from ullme.data.datamodule import ULLMEDataModule
from ullme.engine.objective import Objective
from ullme.engine.reference import AdaptersOff, Cached
from ullme.losses import DPO, KL, SFT, InfoNCE, Term
from ullme.models import ULLME
from ullme.prompts import Prompts

HELD_OUT = 256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the LLM")
    parser.add_argument("--train", type=Path, required=True, help=f"training rows; the last {HELD_OUT} are held out")
    parser.add_argument("--corpus", required=True, help="BEIR folder to evaluate on")
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=48, help="tokens of a passage, in training and evaluation")
    parser.add_argument("--distractors", type=int, default=1000, help="passages ranked beside the relevant ones")
    parser.add_argument("--lr", type=float, default=BASE["lr"], help="of the points that do not say their own")
    parser.add_argument("--data", help="a name for these rows, to tell lines of several data sets apart")
    parser.add_argument("--diagnose", action="store_true", help="measure, do not train")
    parser.add_argument("--output", type=Path, default=Path("runs/grl_study"), help="adapters, scores by query")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "grl_study.jsonl")
    return parser.parse_args()


def build(options: argparse.Namespace, seed: int) -> ULLME:
    """The LLM with a fresh adapter, as configs/small.yaml has it."""
    torch.manual_seed(seed)
    return ULLME(
        model_name_or_path=options.model,
        lora_name="study",
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        dtype="float32",
        prompts=Prompts(query="{text}", generation="{text}\n"),
    ).train()


def split(options: argparse.Namespace) -> dict[str, Path]:
    """Files of the training rows with their mined negatives, the same with none (others are borrowed), and held-out."""
    options.output.mkdir(parents=True, exist_ok=True)
    lines = options.train.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows, held = lines[:-HELD_OUT], lines[-HELD_OUT:]
    parts = {"mined": rows, "other": [json.dumps(json.loads(row) | {"neg": []}) for row in rows], "held_out": held}
    files = {name: options.output / f"{name}.jsonl" for name in parts}
    for name, file in files.items():
        file.write_text("\n".join(parts[name]) + "\n", encoding="utf-8")
    return files


def duplicates(options: argparse.Namespace) -> dict[str, int]:
    """Negatives in all rows; those equal to their positive; those that share more than half of its words (Jaccard)."""
    counts = {"negatives": 0, "equal": 0, "near": 0}
    for line in options.train.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        row = json.loads(line)
        positive = set(row["pos"][0].lower().split())
        for text in row["neg"]:
            words = set(text.lower().split())
            counts["negatives"] += 1
            counts["equal"] += text == row["pos"][0]
            counts["near"] += len(words & positive) > 0.5 * len(words | positive)
    return counts


def batches(options: argparse.Namespace, model: ULLME, file: Path, seed: int, count: int) -> list[Batch]:
    """The first ``count`` batches of an epoch, 1 + 4 candidates for each query."""
    data = ULLMEDataModule(
        train=str(file),
        num_hard_negatives=4,
        batch_size=options.batch_size,
        query_max_length=32,
        passage_max_length=options.max_length,
        num_workers=0,
        seed=seed,
    )
    loader = iter(data.train_dataloader_for(model.prompt_tokenizer, generation=True))
    return [next(loader) for _ in range(count)]


def train(
    options: argparse.Namespace, model: ULLME, settings: dict[str, Any], rows: list[Batch]
) -> dict[str, list[float]]:
    """AdamW with a linear schedule and a tenth of the steps of warm-up, as train.py; each logged value by step."""
    from transformers import get_scheduler

    terms = make_terms(settings)
    objective = Objective(terms, Cached(options.output / "reference", AdaptersOff()))
    objective.check(model, 4, "bf16-mixed")
    for term in terms:
        if isinstance(term, GainKL):
            found = scores(model, rows)  # the adapter still does nothing, so this is pi_ref
            keys = torch.cat([batch.passage_keys for batch in rows])
            term.alone = dict(zip(keys.flatten().tolist(), found["alone"].flatten().tolist(), strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, len(rows) // 10, len(rows))
    history: dict[str, list[float]] = {}
    for batch in rows:
        optimizer.zero_grad()
        with autocast():
            logs = objective.full_batch(model, batch)
        largest = float("inf") if settings["clip"] is None else settings["clip"]
        logs["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, largest)
        optimizer.step()
        schedule.step()
        for name, value in logs.items():
            if not name.startswith("weight/"):
                history.setdefault(name, []).append(round(float(value), 4))
    return history


@torch.no_grad()
def evaluate(options: argparse.Namespace, model: ULLME) -> Tensor:
    """(Q,) nDCG@10 of every query, over all relevant passages and some others, always the same ones.

    The LLM is in bfloat16, as with ``evaluate.py --dtype bfloat16``.
    """
    from torchmetrics.functional.retrieval import retrieval_normalized_dcg

    beir = read_beir(options.corpus, "test")
    model = model.to(torch.bfloat16)
    wanted = {passage for grades in beir.qrels.values() for passage in grades}
    others = [name for name in beir.corpus if name not in wanted]
    names = sorted(wanted) + random.Random(0).sample(others, min(options.distractors, len(others)))
    texts, queries = [beir.corpus[name] for name in names], list(beir.queries.values())
    encode = {"max_length": options.max_length, "show_progress_bar": False, "convert_to_tensor": True}
    similar = model.encode(queries, role="query", **encode) @ model.encode(texts, role="passage", **encode).T
    place = {name: n for n, name in enumerate(names)}
    found = []
    for query, row in zip(beir.queries, similar, strict=True):
        target = torch.zeros(len(row), dtype=torch.long)
        for passage, grade in beir.qrels[query].items():
            target[place[passage]] = grade
        found.append(retrieval_normalized_dcg(row, target, top_k=10))
    return torch.stack(found)


def run(options: argparse.Namespace, name: str, settings: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """One line: train unless ``settings`` is None, measure both rankings, evaluate."""
    from safetensors.torch import save_file

    model = build(options, seed)
    files = split(options)
    start = time.process_time()
    history = {}
    if settings is not None:
        rows = batches(options, model, files[settings["negatives"]], seed, options.steps)
        start = time.process_time()
        history = train(options, model, settings, rows)
    trained = time.process_time()
    found = scores(model, batches(options, model, files["held_out"], 0, 128 // options.batch_size), alone=False)
    stem = f"{name.replace(' ', '_')}-{options.steps}-{seed}"
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad},
              options.output / f"{stem}.safetensors")  # fmt: skip
    begun = time.process_time()
    ndcg = evaluate(options, model)
    torch.save(ndcg, options.output / f"{stem}.ndcg.pt")
    return {
        "ndcg@10": round(100 * float(ndcg.mean()), 3),
        "train_cpu_s": round(trained - start, 1),
        "eval_cpu_s": round(time.process_time() - begun, 1),
        "held_out": rankings(found),
        "history": history,
    }


def diagnose(options: argparse.Namespace) -> dict[str, Any]:
    """Untrained: all rankings on every held-out row, with mined negatives and with other queries' positives."""
    model = build(options, 0)
    rows = batches(options, model, split(options)["held_out"], 0, HELD_OUT // options.batch_size)
    found = scores(model, rows)
    return {
        "queries": len(found["sum"]),
        "false_negatives": duplicates(options),
        "mined": rankings(found),
        "other_topics": rankings(shifted(found, model, rows)),
        "dependence": dependence(found),
        "sharpness": sharpness(found),
    }


def conflict(options: argparse.Namespace, stem: str | None) -> dict[str, Any]:
    """Gradients of the terms on four held-out batches, of an adapter that a run has left, or of a fresh one."""
    from safetensors.torch import load_file

    model = build(options, 0)
    if stem is not None:
        model.load_state_dict(load_file(options.output / f"{stem}.safetensors"), strict=False)
    terms: dict[str, Term] = {
        "CL": InfoNCE(),
        "DPO": DPO(),
        "SFT": SFT(),
        "KL": KL(),
        "KL, P_rt 0.05": KL(retrieval_temperature=0.05),
        "KL, detached": KL(retrieval_temperature=0.05, detach_generation=True),
    }
    return gradients(model, batches(options, model, split(options)["held_out"], 0, 4), terms)


def once(file: Path, line: dict[str, Any], make: Any) -> None:
    """Add ``line`` and what ``make`` returns to the results, unless a line of the same settings is there."""
    done = [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []
    if any(all(old.get(key) == value for key, value in line.items()) for old in done):
        return
    started = time.time()
    result = {**line, **make(), "wall_s": round(time.time() - started, 1), "machine": machine()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(result) + "\n")
    print({k: v for k, v in result.items() if k in ("kind", "name", "seed", "ndcg@10", "train_cpu_s", "wall_s")})


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    common = {"steps": options.steps, "batch_size": options.batch_size, "max_length": options.max_length}
    common["distractors"] = options.distractors
    if options.data:
        common["data"] = options.data
    if options.diagnose:
        once(options.results, {"kind": "diagnosis", **common}, lambda: diagnose(options))
        for stem in (None, f"CL-{options.steps}-0", f"GRL-{options.steps}-0"):
            line = {"kind": "gradients", "adapter": stem, **common}
            if stem is None or (options.output / f"{stem}.safetensors").is_file():
                once(options.results, line, lambda s=stem: conflict(options, s))
        return
    for seed in options.seeds:
        for name in options.points:
            change = POINTS[name]
            settings = None if change is None else BASE | {"lr": options.lr} | change
            line = {"kind": "run", "name": name, "seed": seed, "settings": settings, **common}
            once(options.results, line, lambda n=name, s=settings, r=seed: run(options, n, s, r))


if __name__ == "__main__":
    main()
