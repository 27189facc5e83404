"""A tiny LLM and small local data sets, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_helpers import DOCUMENTS, save_tiny_llm, write_jsonl


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("models"))


@pytest.fixture
def beir_folder(tmp_path) -> Path:
    """Six documents and three queries, one of them with two relevant documents of different grades."""
    folder = tmp_path / "facts"
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "" if n % 2 else f"part {n}", "text": t} for n, t in enumerate(DOCUMENTS)],
    )
    queries = ["where does the cat sleep", "what shines over the sea", "what falls on hills"]
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": t} for n, t in enumerate(queries)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td2\t2\nq1\td5\t1\nq2\td5\t1\n"
    )
    return folder


@pytest.fixture
def sts_file(tmp_path) -> Path:
    path = tmp_path / "similar.tsv"
    rows = [(a, b, n * 0.7) for n, (a, b) in enumerate(zip(DOCUMENTS, [DOCUMENTS[0], *DOCUMENTS[:-1]], strict=True))]
    path.write_text("sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{s}\n" for a, b, s in rows))
    return path


@pytest.fixture
def classification_folder(tmp_path) -> Path:
    folder = tmp_path / "intents"
    rows = [{"text": t, "label": "animal" if n < 2 else "other"} for n, t in enumerate(DOCUMENTS)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[1:4])
    return folder


@pytest.fixture
def clustering_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "topics.jsonl", [{"text": t, "label": n % 2} for n, t in enumerate(DOCUMENTS)])


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    rows = [
        {"sentence1": DOCUMENTS[n], "sentence2": DOCUMENTS[(n * 2) % 6], "label": int(n in (0, 3))} for n in range(6)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def reranking_file(tmp_path) -> Path:
    rows = [
        {"query": "where does the cat sleep", "pos": [DOCUMENTS[0]], "neg": DOCUMENTS[1:4]},
        {"query": "what falls on hills", "pos": [DOCUMENTS[5]], "neg": [DOCUMENTS[0], DOCUMENTS[4]]},
    ]
    return write_jsonl(tmp_path / "rerank.test.jsonl", rows)
