"""How long training takes to start on very many rows, and what a rank then holds in memory.

    python benchmarks/loader_start.py --rows 2000000 6000000 [--compare FOLDER_OF_ANOTHER_CHECKOUT]

Synthetic rows of about 280 bytes (a query, a positive, two negatives) are written to a temporary folder and removed
again. For each number of rows the data module is started three times, in fresh processes: the first start checks the
rows and builds the index, the second one uses it. A third start is that of a resumed run: its first batch is in the
middle of the epoch. Seconds are from the data module to its first batch, tokenised, with the files in the operating
system's cache; libraries are imported before. Memory is what the process holds alone (RssAnon), so not the mapped
index, which all processes share; its peak is that until the first batch. Adds to results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any

RESULTS = Path(__file__).parent / "results" / "loader.json"
BATCH_SIZE = 64


def write_rows(path: Path, count: int) -> None:
    """JSON lines with different texts; every thousandth row has another row's query."""
    with path.open("w") as file:
        for first in range(0, count, 10_000):
            rows = range(first, min(first + 10_000, count))
            file.writelines(_row(n if n % 1000 else n // 2, n) for n in rows)


def _row(query: int, n: int) -> str:
    return (
        f'{{"query": "what is known about number {query}", "pos": ["number {n} is followed by {n + 1} and lies below '
        f'twice itself"], "neg": ["number {n + 7} is another one and says nothing about what was asked here", "of all '
        f'numbers {n + 11} is the one that nobody in this collection ever asked for"]}}\n'
    )


def anonymous_mib() -> float:
    """The memory that this process shares with no file and no other process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class PeakMemory(Thread):
    """The most of :func:`anonymous_mib` from the start of this thread to :meth:`stop`, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stopped = anonymous_mib(), Event()

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            self.peak = max(self.peak, anonymous_mib())

    def stop(self) -> float:
        self._stopped.set()
        self.join()
        return max(self.peak, anonymous_mib())


def start(train: str, model: str, batches: int, first_batch: int = 0) -> dict[str, float]:
    """Start once, in a process that has imported everything; then time some batches, from a batch of the epoch on."""
    from transformers import AutoTokenizer

    from ullme.data.datamodule import ULLMEDataModule
    from ullme.prompts import Prompts, PromptTokenizer

    plain = AutoTokenizer.from_pretrained(model)
    plain.pad_token = plain.pad_token or plain.eos_token
    tokenizer = PromptTokenizer(plain, Prompts(query="{text}"))
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_hard_negatives": 2, "num_workers": 0}
    options |= {"query_max_length": 128, "passage_max_length": 128}
    peak = PeakMemory()
    peak.start()
    before, wall, cpu = anonymous_mib(), time.perf_counter(), time.process_time()
    data = ULLMEDataModule(train=train, **options)
    loader = data.train_dataloader_for(tokenizer, start_batch=first_batch)
    stream = iter(loader)
    next(stream)
    found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    found["peak_memory_mib"] = peak.stop() - before
    dataset, sampler = loader.dataset, iter(loader.batch_sampler)
    cpu = time.process_time()
    rows = sum(len([dataset[place] for place in places]) for places in islice(sampler, 10 * batches))
    found["rows_read_per_cpu_second"] = rows / (time.process_time() - cpu)
    cpu = time.process_time()
    rows = sum(len(batch) for batch in islice(stream, batches))
    found["rows_tokenised_per_cpu_second"] = rows / (time.process_time() - cpu)
    return {**found, "memory_mib": anonymous_mib() - before}


def in_fresh_process(package: Path, cache: Path, *arguments: str) -> dict[str, float]:
    """What :func:`start` gives with the ``ullme`` of a checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "ULLME_CACHE": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return {name: round(value, 3) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000])
    parser.add_argument("--model", required="--child" not in sys.argv, help="folder with a tokenizer")
    parser.add_argument("--batches", type=int, default=100, help="to time")
    parser.add_argument("--compare", type=Path, help="another checkout, whose start is measured too")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train, model, batches, first_batch = options.child
        print(json.dumps(start(train, model, int(batches), int(first_batch))))
        return
    from machine import machine

    here = Path(__file__).resolve().parents[1]
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    origin = {"machine": machine(), "command": f"python benchmarks/loader_start.py {' '.join(words)}"}
    found: dict[str, Any] = {}
    for count in options.rows:
        folder = Path(tempfile.mkdtemp(prefix="loader_start_"))
        try:
            train = folder / "train.jsonl"
            write_rows(train, count)
            arguments = (str(train), options.model, str(options.batches))
            result: dict[str, Any] = {**origin, "bytes": train.stat().st_size}
            middle = str(count // BATCH_SIZE // 2)
            for name, first_batch in (("first", "0"), ("second", "0"), ("resumed", middle)):
                result[name] = in_fresh_process(here, folder / "cache", *arguments, first_batch)
                print(f"{count:,} rows, {name} start: {result[name]}", flush=True)
            index = (file for file in (folder / "cache").rglob("*") if file.is_file())
            result["index_bytes"] = sum(file.stat().st_size for file in index)
            if options.compare:
                result["compared"] = in_fresh_process(options.compare.resolve(), folder / "cache", *arguments, "0")
                print(f"{count:,} rows, the other checkout: {result['compared']}", flush=True)
            found[f"{count} rows"] = result
        finally:
            shutil.rmtree(folder)
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps({**known, "start": {**known.get("start", {}), **found}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
