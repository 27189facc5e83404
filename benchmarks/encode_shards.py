"""Encoding a corpus into shards beside ``ULLME.encode``, which returns one array.

    python benchmarks/encode_shards.py MODEL CORPUS

Both embed the same passages on one thread, in turn: each round has its own passages, and every other round begins with
the other side. Throughput counts CPU seconds, so other work on the machine matters little. Goal: shards at least
0.97 times as fast, though they are also read, checked, hashed, written and synced to the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ullme.search.corpus import Document, open_corpus
from ullme.search.embedder import ULLMEEmbedder, load_text_embedder
from ullme.search.encode import EncodeSettings, encode_corpus
from ullme.search.shards import Shards

GOAL = 0.97


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an LLM, adapter or run")
    parser.add_argument("corpus", help="as for ullme encode")
    parser.add_argument("--passages", type=int, default=3000, help="in all rounds together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--output", help="JSON file for the result")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    embedder = load_text_embedder(options.model, device="cpu", dtype="float32")
    assert isinstance(embedder, ULLMEEmbedder)
    documents = [d for _, d in islice(open_corpus(options.corpus).documents(), options.passages)]
    embedder.model.encode([d.text for d in documents[:50]], role="passage", max_length=options.max_length)  # warm up
    size = len(documents) // options.rounds
    rounds = []
    for number in range(options.rounds):
        part = documents[number * size : (number + 1) * size]
        rounds.append(measure(embedder, part, options.max_length, shards_first=number % 2 == 1))
        print(json.dumps(rounds[-1]), flush=True)
    result = {
        "machine": f"{machine()}, 1 thread",
        "command": f"python benchmarks/encode_shards.py {' '.join(map(named, sys.argv[1:] if argv is None else argv))}",
        "passages": size * options.rounds,
        "encode_passages_per_cpu_s": size / statistics.median(r["encode"] for r in rounds),
        "shards_passages_per_cpu_s": size / statistics.median(r["shards"] for r in rounds),
        "ratio": statistics.median(r["encode"] / r["shards"] for r in rounds),
        "goal": GOAL,
        "rounds": rounds,
    }
    print(f"shards over encode, passages a CPU second: {result['ratio']:.3f} (goal >= {GOAL})")
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


def measure(
    embedder: ULLMEEmbedder, documents: list[Document], max_length: int, shards_first: bool
) -> dict[str, float]:
    """CPU seconds of both sides, and the largest difference between their embeddings."""
    texts = [document.text for document in documents]
    with tempfile.TemporaryDirectory() as place:
        file, folder = Path(place, "corpus.jsonl"), Path(place, "embeddings")
        file.write_text("".join(json.dumps({"_id": d.id, "text": d.text}) + "\n" for d in documents))
        corpus, settings = open_corpus(str(file)), EncodeSettings(max_length=max_length)
        sides: dict[str, Callable[[], Any]] = {
            "encode": lambda: embedder.model.encode(texts, role="passage", max_length=max_length),
            "shards": lambda: encode_corpus(embedder, corpus, folder, settings),
        }
        seconds, found = {}, {}
        for name in sorted(sides, reverse=shards_first):
            start = time.process_time()
            found[name] = sides[name]()
            seconds[name] = time.process_time() - start
        apart = float(np.abs(Shards(folder).vectors(range(len(texts))) - np.asarray(found["encode"])).max())
        assert apart < 1e-5, f"the sides do not compute the same: {apart}"
        shutil.rmtree(folder)
    return {**seconds, "largest_difference": apart}


def named(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if "/" in argument else argument


if __name__ == "__main__":
    main()
