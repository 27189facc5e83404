"""How many real tokens a data worker makes, and how many workers an accelerator wants.

    python benchmarks/loader.py --model FOLDER --train msmarco/train.jsonl [--batches 10]

One process, one thread: reading rows, drawing negatives, templates, tokenising, padding, for queries, passages and
generation, as a worker does it. CPU seconds. Writes results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from itertools import islice
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from machine import machine
from transformers import AutoTokenizer, logging

from ullme.commands.plan import PAPER_DAYS, _llm_config
from ullme.data.datamodule import ULLMEDataModule
from ullme.engine.objective import Objective
from ullme.engine.presets import grl_terms
from ullme.models.config import BackboneConfig
from ullme.planning.devices import DEVICES
from ullme.planning.plan import Job, make_plan
from ullme.prompts import Prompts, PromptTokenizer


def wanted(name: str) -> float:
    """Tokens of queries and passages that GRL on an H200 takes in a second, as ``ullme plan`` predicts."""
    options = BackboneConfig(name, dtype="bfloat16", gradient_checkpointing="auto")
    plan = make_plan(Job(options, _llm_config(options, name), Objective(grl_terms())), DEVICES["h200"])
    job = plan.job
    return job.batch_size * (job.query_tokens + job.candidates * job.passage_tokens) / plan.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a tokenizer")
    parser.add_argument("--train", required=True)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=10)
    options = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = PromptTokenizer(AutoTokenizer.from_pretrained(options.model), Prompts())
    data = ULLMEDataModule(train=options.train, batch_size=options.batch_size, num_workers=0)
    batches = iter(data.train_dataloader_for(tokenizer, generation=True))
    next(batches)
    tokens = queries = 0
    start = time.process_time()
    for batch in islice(batches, options.batches):
        tokens += batch.num_tokens
        queries += len(batch)
    seconds = time.process_time() - start
    found = {"tokens_per_second": tokens / seconds, "queries_per_second": queries / seconds, "queries": queries}
    print(f"{machine()}\none worker: {tokens / seconds:,.0f} tokens/s, {queries / seconds:,.0f} queries/s")
    for name in PAPER_DAYS:
        found[name] = wanted(name)
        count = math.ceil(found[name] * seconds / tokens)
        print(f"{name} on one H200 wants {found[name]:,.0f} tokens/s: {count} worker(s)")
    place = Path(__file__).parent / "results" / "loader.json"
    known = json.loads(place.read_text()) if place.is_file() else {}  # what loader_start.py measured stays
    place.write_text(json.dumps({**known, "machine": machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
