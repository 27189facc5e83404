"""Read queries, and write what was found for them: as a TREC run, or as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ullme.data.files import is_lines
from ullme.data.jsonl import decode_line, iter_lines, parse_line
from ullme.data.records import BadRow, check_utf8
from ullme.utils import atomic_files

# What the first line of a table of queries may be called.
_HEADERS = {
    (key, text)
    for key in ("_id", "id", "qid", "query_id", "query-id", "queryid")
    for text in ("text", "query", "query_text", "question")
}


class Hit(NamedTuple):
    """A document that was found: its score (the larger the better), id and text."""

    score: float
    id: str
    text: str


def read_queries(file: str | Path) -> dict[str, str]:
    """Query id -> text, in the order of the file.

    Args:
        file: .jsonl (or .jsonl.gz) with ``_id`` (or ``id``) and ``text`` (or ``query``), or lines of id, a tab and the
            text (.tsv); a first line that names the two columns is none.

    Raises:
        ValueError: no such file, no queries, a bad line ("file:line: reason"), or a duplicate id.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--queries {file}: no such file; give JSON lines of _id and text, or id, a tab and the text")
    parse = _json_query if is_lines(path) else _tsv_query
    queries: dict[str, str] = {}
    for number, _, line in iter_lines(path):
        try:
            key, text = parse(line)
            if number == 1 and parse is _tsv_query and (key.lower(), text.lower()) in _HEADERS:
                continue
            check_utf8(key + text, "query")
            if not key or not text:
                raise BadRow("the id or the text of the query is empty")
            if key in queries:
                raise BadRow(f"duplicate query id {key!r}")
        except BadRow as reason:
            raise ValueError(f"{path}:{number}: {reason}") from None
        queries[key] = text
    if not queries:
        raise ValueError(f"--queries {file} holds no query; give at least one")
    return queries


def _json_query(line: bytes) -> tuple[str, str]:
    row = parse_line(line)
    if not isinstance(row, dict):
        raise BadRow(f"the row is a {type(row).__name__}, not an object with _id and text")
    key = next((row[name] for name in ("_id", "id") if name in row), None)
    text = next((row[name] for name in ("text", "query") if name in row), None)
    if isinstance(key, bool) or not isinstance(key, str | int) or not isinstance(text, str):
        raise BadRow(f"a query needs '_id' and 'text', and the row has {sorted(row)}")
    return str(key), text.strip()


def _tsv_query(line: bytes) -> tuple[str, str]:
    key, tab, text = decode_line(line).rstrip("\r\n").partition("\t")
    if not tab:
        raise BadRow("expected the query's id, a tab and its text")
    return key.strip(), text.strip()


def check_output(file: str | Path) -> None:
    """Raises: ValueError: the file's name says neither TREC run nor JSON lines, or its folder cannot be written."""
    path = Path(file)
    if path.suffix not in (".trec", ".run", ".txt", ".jsonl"):
        raise ValueError(f"--to {file}: name it .trec for a TREC run, or .jsonl for JSON lines with the texts")
    atomic_files.check_writable(path.absolute().parent, "--to")


def check_ids(file: str | Path, ids: Iterable[str]) -> None:
    """Raises: ValueError: the file is a TREC run, and an id holds white space, which separates the fields there."""
    if Path(file).suffix == ".jsonl":
        return
    for key in ids:
        if len(key.split()) != 1:
            raise ValueError(
                f"--to {file}: the id {key!r} holds white space, which separates the fields of a TREC run; write "
                "--to a .jsonl file instead"
            )


def read_judgements(file: str | Path, queries: Mapping[str, str], queries_name: str) -> dict[str, dict[str, int]]:
    """Query id -> document id -> relevance grade, as :func:`ullme.data.beir.read_qrels` reads them.

    Args:
        file: of ``--qrels``.
        queries: that may be judged.
        queries_name: for messages.

    Raises:
        ValueError: no such file, a bad line, or judgements on other queries.
    """
    from ullme.data.beir import read_qrels

    if not Path(file).is_file():
        raise ValueError(f"--qrels {file}: no such file; give lines of query id, document id and grade, with tabs")
    qrels = read_qrels(Path(file))
    check_judged_queries(qrels, queries, f"--qrels {file}", queries_name)
    return qrels


def check_judged_queries(judged: Iterable[str], queries: Mapping[str, str], qrels_name: str, queries_name: str) -> None:
    """Raises: ValueError: judgements on queries that are not there."""
    if unknown := [query for query in judged if query not in queries]:
        raise ValueError(
            f"{qrels_name} judges {len(unknown)} queries that are not in {queries_name}, first {unknown[:3]}; add them "
            "there, or remove their judgements"
        )


def write_hits(file: str | Path, hits: Mapping[str, Sequence[Hit]], tag: str) -> None:
    """Write what was found for queries, as a TREC run or as JSON lines.

    Args:
        file: .trec, .run or .txt: lines of query id, Q0, document id, rank from 1, score and tag; .jsonl: lines of
            ``query`` and ``hits``.
        hits: query id -> documents, the best first.
        tag: name of the run.

    Raises:
        ValueError: an id holds white space, which separates the fields of a TREC run; or the file cannot be written.
    """
    path = Path(file)
    if path.suffix == ".jsonl":
        lines = [
            json.dumps({"query": query, "hits": [hit._asdict() for hit in found]}, ensure_ascii=False)
            for query, found in hits.items()
        ]
    else:
        check_ids(path, (*hits, *(hit.id for found in hits.values() for hit in found)))
        lines = [
            f"{query} Q0 {hit.id} {rank} {hit.score:.9g} {tag}"
            for query, found in hits.items()
            for rank, hit in enumerate(found, start=1)
        ]
    content = "".join(line + "\n" for line in lines)
    atomic_files.write_text(path, content, "--to")
