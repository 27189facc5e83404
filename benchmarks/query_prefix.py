"""What it saves to read the examples of the query-writing prompt once for many documents, and not for each.

    python benchmarks/query_prefix.py --llm LLM --corpus corpus.jsonl [--documents 64]

The same queries are written with and without the KV cache of the shared prefix, in turns in one process; the figures
are CPU seconds on one thread (on a GPU: seconds).
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from unittest.mock import patch

import torch

from ullme.models import ULLME, prefix_cache
from ullme.query_generation.writer import LLMQueryWriter, WriteSettings
from ullme.search.corpus import Document, open_corpus


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="hub name or folder")
    parser.add_argument("--corpus", required=True, help="as for ullme queries; its first documents with a text")
    parser.add_argument("--documents", type=int, default=64, help="as many as in a part")
    parser.add_argument("--document_max_length", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(argv)


def seconds(writer: LLMQueryWriter, documents: list[Document], settings: WriteSettings) -> tuple[float, list[str]]:
    on_gpu = writer.model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    written = writer.write(documents, settings, lambda number: None)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start, [query.text for query in written]


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    corpus = open_corpus(options.corpus, on_empty="skip")
    documents = list(islice((document for _, document in corpus.documents() if document.text), options.documents))
    settings = WriteSettings(document_max_length=options.document_max_length, max_new_tokens=options.max_new_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    writer = LLMQueryWriter(
        ULLME(options.llm, lora_name=None, dtype="float32" if device == "cpu" else "auto").to(device)
    )
    writer.check(settings)
    found: dict[bool, list[tuple[float, list[str]]]] = {True: [], False: []}
    for _ in range(options.rounds):
        for shared in (True, False):
            least = prefix_cache.MIN_TOKENS if shared else 10**9
            with patch.object(prefix_cache, "MIN_TOKENS", least):
                found[shared].append(seconds(writer, documents, settings))
    with_it, without = (statistics.median(taken for taken, _ in found[shared]) for shared in (True, False))
    same = sum(a == b for a, b in zip(found[True][0][1], found[False][0][1], strict=True))
    print(
        f"{len(documents)} documents on {device}: {with_it:.2f} s with the prefix read once, {without:.2f} s without, "
        f"{without / with_it:.2f} times as fast; {same} queries are the same"
    )


if __name__ == "__main__":
    main()
