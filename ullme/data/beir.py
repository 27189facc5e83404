"""Folders in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ullme.data.jsonl import iter_lines, parse_line
from ullme.data.records import BadRow


@dataclass(frozen=True)
class BeirFolder:
    """A retrieval test collection; the order of the dictionaries is that of the files.

    Args:
        corpus: document id to text, title and text joined with a space. A document may be empty.
        queries: query id to text, only those with relevance judgements.
        qrels: query id to document id to grade.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @property
    def corpus_ids(self) -> list[str]:
        """Document ids; position i is index i of the corpus loader."""
        return list(self.corpus)

    @property
    def query_ids(self) -> list[str]:
        """Query ids; position i is index i of the query loader."""
        return list(self.queries)


def read_beir(folder: str | Path, split: str = "test") -> BeirFolder:
    """Read a folder with corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/SPLIT.tsv (query id,
    document id, grade, with or without a header line).

    Raises:
        ValueError: a missing or empty file, a bad line ("file:line: reason"), an id that comes twice, or judgements
            on ids that are not there.
    """
    folder = Path(folder)
    corpus = _read_texts(folder / "corpus.jsonl", _document)
    queries = _read_texts(folder / "queries.jsonl", _query)
    path = folder / "qrels" / f"{split}.tsv"
    qrels = _read_qrels(path)
    _check_known(path, "queries.jsonl", qrels, queries)
    _check_known(path, "corpus.jsonl", {doc: None for docs in qrels.values() for doc in docs}, corpus)
    judged = {query: text for query, text in queries.items() if query in qrels}
    return BeirFolder(corpus, judged, qrels)


def preview(folder: str | Path, split: str, rows: int) -> None:
    """Read the first rows of each file of such a folder. Raises: ValueError: as :func:`read_beir`, for these rows."""
    folder = Path(folder)
    _read_texts(folder / "corpus.jsonl", _document, rows)
    _read_texts(folder / "queries.jsonl", _query, rows)
    _read_qrels(folder / "qrels" / f"{split}.tsv", rows)


def _read_texts(path: Path, parse: Callable[[dict[str, Any]], str], most: int | None = None) -> dict[str, str]:
    _check_exists(path)
    texts: dict[str, str] = {}
    for number, _, line in islice(iter_lines(path), most):
        try:
            row = parse_line(line)
            key = _id(row)
            if key in texts:
                raise BadRow(f"the id {key!r} comes twice")
            texts[key] = parse(row)
        except BadRow as reason:
            raise ValueError(f"{path}:{number}: {reason}") from None
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


def _id(row: Any) -> str:
    if not isinstance(row, dict):
        raise BadRow(f"the row is a {type(row).__name__}, not an object with keys")
    if "_id" not in row:
        raise BadRow("missing key '_id'")
    if isinstance(row["_id"], bool) or not isinstance(row["_id"], str | int):
        raise BadRow(f"'_id' must be a text or a whole number, not {type(row['_id']).__name__}")
    return str(row["_id"])


def _document(row: dict[str, Any]) -> str:
    return f"{_string(row, 'title', '')} {_string(row, 'text')}".strip()


def _query(row: dict[str, Any]) -> str:
    text = _string(row, "text").strip()
    if not text:
        raise BadRow("'text' is an empty text")
    return text


def _string(row: dict[str, Any], key: str, missing: str | None = None) -> str:
    value = row.get(key) if row.get(key) is not None else missing
    if key not in row and missing is None:
        raise BadRow(f"missing key '{key}'")
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a text, not {type(value).__name__}")
    return value.strip()


def _read_qrels(path: Path, most: int | None = None) -> dict[str, dict[str, int]]:
    if not path.is_file() and path.parent.is_dir():
        there = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise ValueError(f"{path}: no such file; qrels holds the splits {there}, choose one with data.val_split")
    _check_exists(path)
    qrels: dict[str, dict[str, int]] = {}
    for number, _, line in islice(iter_lines(path), most):
        columns = line.decode("utf-8", errors="replace").rstrip("\r\n").split("\t")
        try:
            query, document, grade = columns
            qrels.setdefault(query, {})[document] = int(grade)
        except ValueError:
            if number == 1 and len(columns) == 3:  # the header
                continue
            raise ValueError(
                f"{path}:{number}: expected query id, document id and a whole number, with tabs between: {columns}"
            ) from None
    if not qrels:
        raise ValueError(f"{path} holds no relevance judgement")
    return qrels


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")


def _check_known(path: Path, file: str, named: dict[str, Any], known: dict[str, str]) -> None:
    if unknown := [key for key in named if key not in known]:
        raise ValueError(f"{path} names {len(unknown)} ids that are not in {file}, first {unknown[:3]}")
