"""Train every recipe scaled down on the same data, evaluate each, and write one table with the commands.

Trains through train.py and evaluates through evaluate.py, both as subprocesses, so every figure can be had by hand:

    python benchmarks/recipes.py --model FOLDER --train train.jsonl --corpus BEIR_FOLDER ... --sts FILE

A recipe keeps what defines it (attention, pooling, templates, losses, what is trained, the stages); the number of
steps, the batch, lengths and learning rate are the same for all, apart from what ``RATES`` says. What a recipe needs
and the model or the data lack is made from them: biases of zero for BitFit, and the positives as texts for the
unsupervised stages. Runs whose result is there are not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# after those they start from; evaluation leaves out the first stage of LLM2Vec, which is no embedder yet
RECIPES = (
    *("sentence_transformers", "sgpt", "repllama", "echo", "gritlm"),
    *("llm2vec_mntp", "llm2vec_simcse", "llm2vec_supervised", "nv_embed", "nv_embed_stage2", "ullme"),
)
EARLIER = {"llm2vec_simcse": "llm2vec_mntp", "llm2vec_supervised": "llm2vec_mntp", "nv_embed_stage2": "nv_embed"}
UNSUPERVISED = ("llm2vec_mntp", "llm2vec_simcse")
# of training all weights; adapters and biases take --lr
RATES = {"sentence_transformers": 2e-4, "gritlm": 2e-4}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the LLM")
    parser.add_argument("--train", type=Path, required=True, help="training rows: JSON lines of query, pos, neg")
    parser.add_argument("--corpus", nargs="+", required=True, help="BEIR folders to evaluate on")
    parser.add_argument("--sts", nargs="*", default=[], help="STS files to evaluate on")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a passage; echo has twice as many")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    return parser.parse_args()


def with_biases(model: Path, output: Path) -> Path:
    """A copy of a Llama folder whose linear layers have biases, which start at zero and so change nothing."""
    copy = output / f"{model.name}-biases"
    shutil.copytree(model, copy, dirs_exist_ok=True, copy_function=shutil.copyfile)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attention_bias": True, "mlp_bias": True}, indent=2))
    return copy


def positives(train: Path, output: Path) -> Path:
    """The positives of the training rows, a text a row."""
    texts = output / "texts.jsonl"
    with train.open() as rows, texts.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for row in rows for text in json.loads(row)["pos"])
    return texts


def train_command(options: argparse.Namespace, name: str) -> list[str]:
    folder, length = options.output / name, options.max_length * (2 if name == "echo" else 1)
    configs = [f"--config=configs/{c}" for c in ("base.yaml", "strategy/cpu.yaml", f"recipes/{name}.yaml")]
    model = with_biases(options.model, options.output) if name == "sgpt" else options.model
    data = positives(options.train, options.output) if name in UNSUPERVISED else options.train
    negatives = 1 if name == "gritlm" else 4
    rules = f'{{"train": "{data}", "in_batch_negatives": false}}'
    return [
        *("train.py", "fit", *configs, "--seed_everything=0", f"--trainer.max_steps={options.steps}"),
        *("--trainer.max_epochs=-1", "--trainer.val_check_interval=null", "--trainer.log_every_n_steps=1"),
        *("--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"),
        *("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}"),
        *("--trainer.logger.name=", "--trainer.logger.version="),
        *(f"--model.backbone.model_name_or_path={model}", "--model.backbone.dtype=float32"),
        *([f"--model.backbone.init_from={options.output / EARLIER[name]}"] if name in EARLIER else []),
        *(f"--model.optimizer.lr={RATES.get(name, options.lr)}", "--model.optimizer.warmup=0.1"),
        *((f"--data.datasets=[{rules}]",) if name == "nv_embed_stage2" else (f"--data.train={data}",)),
        *(["--data.datasets=null"] if name == "gritlm" else []),  # its rows of instructions are not among the data
        *("--data.train_name=null", "--data.max_rows=null", f"--data.batch_size={options.batch_size}"),
        f"--data.num_hard_negatives={0 if name in UNSUPERVISED else negatives}",
        *(f"--data.query_max_length={length}", f"--data.passage_max_length={length}"),
    ]


def evaluate_command(options: argparse.Namespace, name: str) -> list[str]:
    length = options.max_length * (2 if name == "echo" else 1)
    own = [f"--checkpoint={options.output / name}"] if name != "untrained" else ["--query_prompt={text}"]
    sts = ["--sts", *options.sts] if options.sts else []
    return [
        *(
            "evaluate.py",
            f"--model={model_of(options, name)}",
            *own,
            "--dtype=bfloat16",
            f"--max_length={length}",
            "--progress=false",
        ),
        *(f"--output={options.output / 'results'}", "--corpus", *options.corpus, *sts),
    ]


def model_of(options: argparse.Namespace, name: str) -> Path:
    return with_biases(options.model, options.output) if name == "sgpt" else options.model


def call(log: Path, command: list[str]) -> None:
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"failed, see {log}: {shlex.join(command)}")


def run(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Train, unless it is the untrained LLM, and evaluate; main scores by task, times 100."""
    folder = options.output / name
    scores = folder / "scores.json"
    if not scores.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if name != "untrained" and not (folder / "checkpoints" / "finished").is_file():
            call(folder / "train.log", train_command(options, name))
        if name == "llm2vec_mntp":
            return {}
        call(folder / "eval.log", evaluate_command(options, name))
        rows = [line.split() for line in (folder / "eval.log").read_text().splitlines()]
        found = {row[0].rsplit("-", 1)[0]: float(row[-1]) for row in rows if {"Retrieval", "STS"} & set(row[1:-1])}
        scores.write_text(json.dumps(found))
    return json.loads(scores.read_text())


def table(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> str:
    """Markdown: the scores, and the commands that gave them."""
    tasks = list(results["untrained"])
    lines = ["| recipe | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    lines += [f"| {n} | " + " | ".join(f"{s[t]:.1f}" for t in tasks) + " |" for n, s in results.items() if s]
    for name in results:
        commands = [] if name == "untrained" else [train_command(options, name)]
        commands += [] if name == "llm2vec_mntp" else [evaluate_command(options, name)]
        lines += ["", f"{name}:", "", "```sh", *(f"python {shlex.join(c)}" for c in commands), "```"]
    return "\n".join(lines)


def main() -> None:
    options = parse()
    options.output, options.train, options.model = (p.resolve() for p in (options.output, options.train, options.model))
    results = {name: run(options, name) for name in ("untrained", *options.recipes)}
    text = table(options, results)
    (options.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
