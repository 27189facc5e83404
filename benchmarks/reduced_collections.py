"""Small parts of retrieval collections, so that a study of a real LLM fits into hours on two cores.

    python benchmarks/reduced_collections.py --data FOLDER --output FOLDER

``--data`` has the layout that configs/paper/real.yaml reads (msmarco/train.jsonl, msmarco/dev, trec-dl19, wikiqa, sts).
What is kept is a function of the files and the seed alone:

- msmarco/dev and trec-dl19: some queries, some relevant passages of each, and other passages at random;
- wikiqa/rerank.test.jsonl and sts/STSBenchmark.test.tsv: some rows at random;
- msmarco/train.jsonl: every row; msmarco/labelled.jsonl: the first rows after a shuffle, as many as ``--labelled``;
- msmarco/unlabelled.jsonl: every other row as ``query`` and shuffled ``candidates``, its positive not marked.

Scores on a part are not comparable with those on the whole collection.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the whole collections")
    parser.add_argument("--output", type=Path, required=True, help="folder for the parts")
    parser.add_argument("--queries", type=int, default=200, help="queries of each retrieval collection, at most")
    parser.add_argument("--passages", type=int, default=500, help="passages of each retrieval collection, at least")
    parser.add_argument("--relevant", type=int, default=8, help="relevant passages of a query, at most")
    parser.add_argument("--rows", type=int, default=80, help="queries of wikiqa; three times as many pairs of STS")
    parser.add_argument("--labelled", type=int, default=256, help="rows of msmarco/labelled.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def reduce_retrieval(source: Path, target: Path, options: argparse.Namespace) -> dict[str, int]:
    """Sample queries, their relevant passages, and others; returns the sizes of the part."""
    rng = random.Random(options.seed)
    corpus, queries = read_jsonl(source / "corpus.jsonl"), read_jsonl(source / "queries.jsonl")
    with (source / "qrels" / "test.tsv").open(encoding="utf-8") as file:
        judgements = [row for row in csv.DictReader(file, delimiter="\t") if int(row["score"]) > 0]
    known = {row["_id"] for row in corpus}
    relevant: dict[str, list[dict[str, str]]] = {}
    for row in judgements:
        if row["corpus-id"] in known:
            relevant.setdefault(row["query-id"], []).append(row)
    judged = [query for query in queries if query["_id"] in relevant]
    chosen = rng.sample(judged, min(options.queries, len(judged)))
    kept = []
    for query in chosen:
        own = relevant[query["_id"]]
        kept += rng.sample(own, min(options.relevant, len(own)))
    passages = {row["corpus-id"] for row in kept}
    # A passage that is relevant to a kept query, but whose judgement was not kept, would count as wrong.
    left_out = {row["corpus-id"] for query in chosen for row in relevant[query["_id"]]} - passages
    others = [row["_id"] for row in corpus if row["_id"] not in passages | left_out]
    passages |= set(rng.sample(others, min(len(others), max(0, options.passages - len(passages)))))
    write_jsonl(target / "corpus.jsonl", [row for row in corpus if row["_id"] in passages])
    write_jsonl(target / "queries.jsonl", chosen)
    (target / "qrels").mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *(f"{r['query-id']}\t{r['corpus-id']}\t{r['score']}" for r in kept)]
    (target / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"queries": len(chosen), "passages": len(passages), "relevant": len(kept)}


def main() -> None:
    options = parse()
    rng = random.Random(options.seed)
    for name in ("msmarco/dev", "trec-dl19"):
        print(name, reduce_retrieval(options.data / name, options.output / name, options))
    reranking = read_jsonl(options.data / "wikiqa" / "rerank.test.jsonl")
    write_jsonl(
        options.output / "wikiqa" / "rerank.test.jsonl", rng.sample(reranking, min(options.rows, len(reranking)))
    )
    header, *pairs = (
        (options.data / "sts" / "STSBenchmark.test.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
    )
    (options.output / "sts").mkdir(parents=True, exist_ok=True)
    sample = rng.sample(pairs, min(3 * options.rows, len(pairs)))
    (options.output / "sts" / "STSBenchmark.test.tsv").write_text("\n".join([header, *sample]) + "\n", encoding="utf-8")
    rows = read_jsonl(options.data / "msmarco" / "train.jsonl")
    write_jsonl(options.output / "msmarco" / "train.jsonl", rows)
    order = rng.sample(range(len(rows)), len(rows))
    write_jsonl(options.output / "msmarco" / "labelled.jsonl", [rows[n] for n in order[: options.labelled]])
    unlabelled = []
    for n in order[options.labelled :]:
        candidates = [*rows[n]["pos"][:1], *rows[n]["neg"][:4]]
        unlabelled.append({"query": rows[n]["query"], "candidates": rng.sample(candidates, len(candidates))})
    write_jsonl(options.output / "msmarco" / "unlabelled.jsonl", unlabelled)
    print(f"msmarco: {len(rows)} rows, {options.labelled} labelled apart, {len(unlabelled)} unlabelled")


if __name__ == "__main__":
    main()
