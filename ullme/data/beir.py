"""Read retrieval test collections in BEIR format: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ullme.data.jsonl import decode_line, iter_lines, parse_line
from ullme.data.records import BadRow, check_utf8


@dataclass(frozen=True)
class BeirFolder:
    """A retrieval test collection. The dictionaries are in the order of the files.

    Args:
        corpus: document id -> title and text, joined by a space; a document may be empty.
        queries: query id -> text, for queries with relevance judgements.
        qrels: query id -> document id -> relevance grade; all ids are in the corpus.
        own_copies: queries that are documents too, under the same id and with the same text, and are not judged
            relevant to themselves. As in BEIR (arXiv 2104.08663; its Quora and ArguAna), such a document is left out
            of its own query's ranking.
        notes: what was left out in reading, one line each, for the user.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    own_copies: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def corpus_ids(self) -> list[str]:
        """Document ids, in the order of the indices of the corpus dataloader."""
        return list(self.corpus)

    @property
    def query_ids(self) -> list[str]:
        """Query ids, in the order of the indices of the query dataloader."""
        return list(self.queries)


def read_beir(folder: str | Path, split: str = "test") -> BeirFolder:
    """Read a folder with corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/SPLIT.tsv (query id,
    document id, grade, with or without a header line).

    Judgements on documents that the corpus lacks (BEIR's ArguAna has such) are left out, and so are queries of which
    no judgement remains; ``notes`` has the counts.

    Raises:
        ValueError: a missing or empty file, a bad line ("file:line: reason"), a duplicate id, judgements
            on unknown queries, or none on a document of the corpus.
    """
    folder = Path(folder)
    _check_exists(folder / "corpus.jsonl")
    queries = _read_texts(folder / "queries.jsonl", _query)
    copies: set[str] = set()

    def document(row: dict[str, Any]) -> str:
        text = _document(row)
        query = queries.get(key := str(row["_id"]))
        if query is not None and is_copy(query, text):
            copies.add(key)
        return text

    corpus = _read_texts(folder / "corpus.jsonl", document)
    path = folder / "qrels" / f"{split}.tsv"
    judgements = read_qrels(path)
    _check_ids(path, "queries.jsonl", judgements, queries)
    qrels, notes = _known_documents(judgements, corpus, path)
    judged = {query: text for query, text in queries.items() if query in qrels}
    own = frozenset(query for query in copies if query in qrels and qrels[query].get(query, 0) <= 0)
    if own:
        notes.append(
            f"{folder / 'corpus.jsonl'} has {len(own)} of {len(judged)} queries as documents with the same id and "
            "text; each is left out of its own query's ranking, as in BEIR"
        )
    return BeirFolder(corpus, judged, qrels, own, tuple(notes))


def preview(folder: str | Path, split: str, rows: int) -> None:
    """Check the first ``rows`` rows of each file, without reading the rest.

    Raises:
        ValueError: as in :func:`read_beir`, for these rows.
    """
    folder = Path(folder)
    _read_texts(folder / "corpus.jsonl", _document, rows)
    _read_texts(folder / "queries.jsonl", _query, rows)
    read_qrels(folder / "qrels" / f"{split}.tsv", rows)


def _read_texts(path: Path, parse: Callable[[dict[str, Any]], str], max_lines: int | None = None) -> dict[str, str]:
    """Id -> text of a JSONL file."""
    _check_exists(path)
    texts: dict[str, str] = {}
    for number, _, line in islice(iter_lines(path), max_lines):
        try:
            row = parse_line(line)
            key = _id(row)
            if key in texts:
                raise BadRow(f"duplicate _id {key!r}")
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
    check_utf8(key := str(row["_id"]), "_id")
    return key


def _document(row: dict[str, Any]) -> str:
    return f"{_text(row, 'title', '')} {_text(row, 'text')}".strip()


def _query(row: dict[str, Any]) -> str:
    text = _text(row, "text").strip()
    if not text:
        raise BadRow("'text' is an empty text")
    return text


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    """The text under a key. Raises: BadRow: it is missing, without a default, or not a text."""
    value = row.get(key) if row.get(key) is not None else default
    if key not in row and default is None:
        raise BadRow(f"missing key '{key}'")
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a text, not {type(value).__name__}")
    check_utf8(value, key)
    return value.strip()


def read_qrels(path: Path, max_lines: int | None = None) -> dict[str, dict[str, int]]:
    """Query id -> document id -> grade, from a file of three columns separated by tabs.

    Raises:
        ValueError: a missing or empty file, or a bad line ("file:line: reason").
    """
    if not path.is_file() and path.parent.is_dir():
        splits = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise ValueError(f"{path}: no such file; qrels holds the splits {splits}: name one, or copy it to this file")
    _check_exists(path)
    qrels: dict[str, dict[str, int]] = {}
    for number, _, line in islice(iter_lines(path), max_lines):
        try:
            columns = decode_line(line).rstrip("\r\n").split("\t")
        except BadRow as reason:
            raise ValueError(f"{path}:{number}: {reason}") from None
        try:
            query, document, grade = columns
            qrels.setdefault(query, {})[document] = int(grade)
        except ValueError:
            if number == 1 and len(columns) == 3 and not _is_number(columns[2]):  # the header
                continue
            raise ValueError(
                f"{path}:{number}: expected query id, document id and integer grade, separated by tabs; got {columns}"
            ) from None
    if not qrels:
        raise ValueError(f"{path} has no relevance judgements")
    return qrels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_copy(query: str, document: str) -> bool:
    """Whether a document has a query's text, white space and a title in front aside. Only of a document with the
    query's id does this say that it is the query.

    Args:
        query: its text.
        document: title and text, joined; the title is not known apart in an encoded corpus.
    """
    return f" {_words(document)}".endswith(f" {_words(query)}")


def _words(text: str) -> str:
    return " ".join(text.split())


def _known_documents(
    judgements: dict[str, dict[str, int]], corpus: dict[str, str], path: Path
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """The judgements on documents of the corpus, and what to tell about the others.

    Raises:
        ValueError: there are none.
    """
    known = {q: {doc: grade for doc, grade in grades.items() if doc in corpus} for q, grades in judgements.items()}
    kept = {query: grades for query, grades in known.items() if grades}
    missing = [doc for grades in judgements.values() for doc in grades if doc not in corpus]
    if not kept:
        raise ValueError(f"{path} has no judgement on a document of corpus.jsonl; it names {missing[:3]}")
    if not missing:
        return kept, []
    note = f"{path}: {len(missing)} judgements are on documents that are not in corpus.jsonl (first {missing[:3]})"
    dropped = len(judgements) - len(kept)
    without = f", and with them {dropped} queries without any other" if dropped else ""
    return kept, [f"{note}; they are left out{without}"]


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")


def _check_ids(path: Path, file: str, judged: dict[str, Any], known: dict[str, str]) -> None:
    """Raises: ValueError: qrels have ids that are not in the file."""
    if unknown := [key for key in judged if key not in known]:
        raise ValueError(
            f"{path} has {len(unknown)} ids that are not in {file}, first {unknown[:3]}; add or remove them"
        )
