"""One training row, and the column schemas it can arrive in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from ullme.data.bad_row import BadRow
from ullme.data.columns import NO_FIELDS, Columns, read_columns, unread_fields
from ullme.utils.dotted_names import named

__all__ = ["BadRow", "Record", "Schema", "parse_record"]

# auto, or a key of _PARSERS, or the dotted path of a user's own parser
Schema = str

_NUMBERED_NEGATIVE = re.compile(r"negative_(\d+)")
# Words of the names that other projects give to columns of positives and negatives: hard_negs, neg_1, negativeTexts ...
_POSITIVE_OR_NEGATIVE = re.compile(r"(pos|neg)(itive)?(ative)?s?")
_OF_TEXTS = re.compile(
    r"\d+|hard|easy|mined|random|in|batch|query|(text|passage|paragraph|doc|document|ctx|context|answer|response|example"
    r"|sample|sentence|candidate)s?"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


@dataclass(frozen=True)
class Record:
    """One row: a query, what answers it and what does not; or a query and candidates that nobody has judged.

    Args:
        query: the query's text.
        positives: texts, all different; none where no text is known to answer the query.
        negatives: any number of texts, all different, none of them a positive of this row; without positives the
            candidates, two at least.
        instruction: the task description of this row, or None for the prompt contract's own.
        columns: numbers by name: a number of the query, or one for each positive and then each negative; NaN where
            there is none.
        symmetric: whether query and passages are texts of one kind, so that both have the query's template.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    instruction: str | None = None
    columns: Columns = field(default_factory=dict)
    symmetric: bool = False

    @property
    def labelled(self) -> bool:
        """Whether a positive is known."""
        return bool(self.positives)

    @property
    def num_negatives(self) -> int:
        """Texts beside the first candidate, which is a positive where one is known."""
        return len(self.negatives) - (not self.labelled)


class _Texts(NamedTuple):
    """What a schema reads of a row, before repeated texts are dropped."""

    query: str
    positives: list[str]
    negatives: list[str]
    instruction: str | None = None
    passages: Sequence[Any] = ()  # positives and negatives as the row has them, where they may be objects
    columns: Columns = MappingProxyType({})
    labelled: bool = True
    symmetric: bool = False


def parse_record(
    row: Any, schema: Schema = "auto", fields: Mapping[str, str] = NO_FIELDS, side: Mapping[str, Any] = NO_FIELDS
) -> Record:
    """Read one raw row.

    Texts lose white space at their ends, repeated texts are dropped, and so is a negative that equals a positive of
    the same row: a model must never be taught that a positive is its own negative. The numbers of a text that is
    dropped go with it.

    Args:
        row: a mapping from column to value.
        schema: which columns to expect; ``auto`` recognises them, all but ``text``, where a row is one text, which
            is query and positive at once; of a row of retrieval it is the first positive. The dotted path of a
            function that takes a row and returns a :class:`Record` reads columns of your own.
        fields: column of numbers -> field of the row, besides the usual ones (``score``, ``pos_scores`` ...).
        side: column of numbers -> what a side file has for this row.

    Raises:
        BadRow: not a mapping, a missing key, a wrong type, an empty text, no positive, or numbers that do not fit the
            texts.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"the row is a {type(row).__name__}, not an object with keys; write one JSON object a line")
    if "." in schema:
        texts = _own_texts(row, schema)
    else:
        schema = detect_schema(row) if schema == "auto" else schema
        texts = _PARSERS[schema](row)
        _check_all_texts_are_read(row, schema)
    passages = texts.passages or [*texts.positives, *texts.negatives]
    # with the schema text a row is one text, whatever else it holds
    numbers = {} if schema == "text" else read_columns(row, passages, len(texts.positives), fields, side)
    read = {**numbers, **texts.columns}
    return _record(texts, read)


def unread(row: Mapping[str, Any], schema: Schema, fields: Mapping[str, str] = NO_FIELDS) -> list[str]:
    """Fields of a row that nothing reads; none for a function of your own, of which nobody knows what it reads."""
    if "." in schema:
        return []
    schema = detect_schema(row) if schema == "auto" else schema
    known = [name for name in row if schema == "sentence-transformers" and _NUMBERED_NEGATIVE.fullmatch(name)]
    return unread_fields(row, [*_FIELDS[schema], *known], fields)


def check_schema(schema: Schema, option: str = "data.schema") -> None:
    """Raises: ValueError: no schema is called so, and nothing can be imported under this name."""
    if "." in schema:
        named(schema, option)
    elif schema != "auto" and schema not in _PARSERS:
        raise ValueError(
            f"{option}={schema!r} is unknown; choose one of auto, {', '.join(_PARSERS)}, or give module.name of a "
            "function of your own"
        )


def _own_texts(row: Mapping[str, Any], schema: str) -> _Texts:
    """What a user's parser makes of a row, checked as every other row; what it raises is the reason of a bad row."""
    try:
        found = named(schema, "data.schema")(row)
        parts = found.query, list(found.positives), list(found.negatives), found.instruction
        columns = dict(getattr(found, "columns", {}))
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(f"{schema} failed with {type(error).__name__}: {error}") from error
    query, positives, negatives, instruction = parts
    count = len(positives) + len(negatives)
    return _Texts(
        _text(query, "query"),
        [_text(text, f"positives[{i}]") for i, text in enumerate(positives)],
        [_text(text, f"negatives[{i}]") for i, text in enumerate(negatives)],
        instruction,
        columns=read_columns({}, [""] * count, len(positives), side=columns),
    )


def detect_schema(row: Mapping[str, Any]) -> Schema:
    """The schema whose columns these are. Raises: BadRow: none."""
    if row.keys() & {"positive_passages", "negative_passages"}:
        return "tevatron"
    if row.keys() & {"pos", "neg"}:
        return "bge"
    if "anchor" in row or isinstance(row.get("positive"), str):
        return "sentence-transformers"
    if row.keys() & {"positive", "negative"}:
        return "ullme"
    if "candidates" in row:
        return "candidates"
    if row.keys() >= {"sentence1", "sentence2"}:
        return "pairs"
    if "messages" in row or row.keys() >= {"prompt", "completion"}:
        return "chat"
    raise BadRow(
        f"missing key: {sorted(map(str, row))} fit no schema; expected query and pos (bge), query and "
        "positive_passages (tevatron), anchor and positive (sentence-transformers), query and positive (ullme) or, "
        "without labels, query and candidates (candidates); sentence1, sentence2 and score (pairs); or messages (chat)"
    )


# Schema -> the columns of positives and negatives that it reads; "text" reads one text on purpose.
_READ: dict[Schema, str] = {
    "bge": "pos and neg (lists)",
    "tevatron": "positive_passages and negative_passages (lists)",
    "sentence-transformers": "positive, negative and negative_1, negative_2 ... (texts)",
    "ullme": "positive and negative (lists)",
}


def _check_all_texts_are_read(row: Mapping[str, Any], schema: Schema) -> None:
    """Raises: BadRow: a column has positives or negatives, by its name and content, and the schema does not read it."""
    if schema not in _READ:
        return
    for key, value in row.items():
        if _holds_texts(str(key)) and not _reads(schema, key) and _has_text(value):
            raise BadRow(
                f"{key!r} is no column of the {schema} schema, which reads {_READ[schema]}; rename it, or leave it out"
            )


def _reads(schema: Schema, key: str) -> bool:
    columns = _READ[schema].partition(" (")[0].replace(",", " ").split()
    return key in columns or (schema == "sentence-transformers" and _NUMBERED_NEGATIVE.fullmatch(key) is not None)


@cache
def _holds_texts(key: str) -> bool:
    """Whether a column's name says positives or negatives, and not what belongs to them (neg_scores, positive_ids)."""
    words = [word.lower() for word in _WORD.findall(key)]
    named = [word for word in words if _POSITIVE_OR_NEGATIVE.fullmatch(word)]
    return bool(named) and all(word in named or _OF_TEXTS.fullmatch(word) for word in words)


def _has_text(value: Any) -> bool:
    """Whether a value is a text that is not blank or a passage, or a list with one."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, Mapping) or (isinstance(one, str) and bool(one.strip())) for one in values)


def _parse_bge(row: Mapping[str, Any]) -> _Texts:
    instruction = row.get("prompt")
    if not isinstance(instruction, str | None):
        raise BadRow(f"'prompt' must be a text, not {type(instruction).__name__}")
    check_utf8(instruction or "", "prompt")
    negatives = _texts(row, "neg") if row.get("neg") is not None else []
    return _Texts(_text(_get(row, "query"), "query"), _texts(row, "pos"), negatives, instruction or None)


def _parse_ullme(row: Mapping[str, Any]) -> _Texts:
    negatives = _texts(row, "negative") if row.get("negative") is not None else []
    return _Texts(_text(_get(row, "query"), "query"), _texts(row, "positive"), negatives)


def _parse_tevatron(row: Mapping[str, Any]) -> _Texts:
    negatives = _passages(row, "negative_passages") if row.get("negative_passages") is not None else []
    query, positives = _text(_get(row, "query"), "query"), _passages(row, "positive_passages")
    return _Texts(
        query, positives, negatives, passages=[*row["positive_passages"], *(row.get("negative_passages") or [])]
    )


def _parse_sentence_transformers(row: Mapping[str, Any]) -> _Texts:
    query = "anchor" if "anchor" in row else "query"
    # A table of rows with different numbers of negatives has nulls in the columns that a row does not use.
    numbered = sorted((int(m[1]), key) for key in row if (m := _NUMBERED_NEGATIVE.fullmatch(key)))
    keys = [key for key in ("negative", *(key for _, key in numbered)) if row.get(key) is not None]
    return _Texts(
        _text(_get(row, query), query),
        [_text(_get(row, "positive"), "positive")],
        [_text(row[key], key) for key in keys],
    )


def _parse_candidates(row: Mapping[str, Any]) -> _Texts:
    """A query and passages that may answer it, nobody knows which: texts, or objects with title and text."""
    values = _list(row, "candidates")
    texts = [
        join_title(value, f"candidates[{i}]") if isinstance(value, Mapping) else _text(value, f"candidates[{i}]")
        for i, value in enumerate(values)
    ]
    if (different := len(set(texts))) < 2:
        raise BadRow(
            f"'candidates' holds {different} different texts; without a label a query's candidates are compared "
            "with one another, so give at least 2"
        )
    return _Texts(_text(_get(row, "query"), "query"), [], texts, passages=values, labelled=False)


def _parse_pairs(row: Mapping[str, Any]) -> _Texts:
    """Two texts of one kind, whose similarity is the column ``score``; the second is no known answer to the first."""
    texts = [_text(_get(row, key), key) for key in ("sentence1", "sentence2")]
    return _Texts(texts[0], [], texts[1:], labelled=False, symmetric=True)


def _parse_chat(row: Mapping[str, Any]) -> _Texts:
    """The last answer of an assistant is the positive; what was said before it, joined by blank lines, is the query."""
    if "messages" not in row:
        return _Texts(_text(_get(row, "prompt"), "prompt"), [_text(_get(row, "completion"), "completion")], [])
    said = []
    for n, message in enumerate(_list(row, "messages")):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadRow(f"'messages[{n}]' must be an object with role and content")
        said.append((message["role"], _text(message["content"], f"messages[{n}].content")))
    answers = [n for n, (role, _) in enumerate(said) if role == "assistant"]
    if not answers or answers[-1] == 0:
        raise BadRow("'messages' holds no answer of the role assistant after another message")
    return _Texts("\n\n".join(text for _, text in said[: answers[-1]]), [said[answers[-1]][1]], [])


def _parse_text(row: Mapping[str, Any]) -> _Texts:
    """The column ``text``; of a row of retrieval, which has none, the first positive."""
    if "text" not in row and row.keys() & {"pos", "positive", "positive_passages"}:
        texts = _PARSERS[detect_schema(row)](row).positives
        if not texts:
            raise BadRow("no positive")
        text = texts[0]
    else:
        text = _text(_get(row, "text"), "text")
    return _Texts(text, [text], [])


_PARSERS: dict[str, Callable[[Mapping[str, Any]], _Texts]] = {
    "bge": _parse_bge,
    "tevatron": _parse_tevatron,
    "sentence-transformers": _parse_sentence_transformers,
    "ullme": _parse_ullme,
    "candidates": _parse_candidates,
    "pairs": _parse_pairs,
    "chat": _parse_chat,
    "text": _parse_text,
}
# Schema -> the fields that its parser reads.
_FIELDS: dict[Schema, tuple[str, ...]] = {
    "bge": ("query", "pos", "neg", "prompt"),
    "tevatron": ("query", "positive_passages", "negative_passages"),
    "sentence-transformers": ("anchor", "query", "positive", "negative"),
    "ullme": ("query", "positive", "negative"),
    "candidates": ("query", "candidates"),
    "pairs": ("sentence1", "sentence2"),
    "chat": ("messages", "prompt", "completion"),
    "text": ("text", "query", "pos", "positive", "positive_passages"),
}


def _record(texts: _Texts, columns: Columns) -> Record:
    """Every text once, with its numbers: the first of those that are equal, positives before negatives."""
    if texts.labelled and not texts.positives:
        raise BadRow("no positive")
    if len({*texts.positives, *texts.negatives}) == len(texts.positives) + len(texts.negatives):  # as of most rows
        own, others = tuple(texts.positives), tuple(texts.negatives)
        return Record(texts.query, own, others, texts.instruction, dict(columns), texts.symmetric)
    kept: dict[str, int] = {}
    for place, text in enumerate([*texts.positives, *texts.negatives]):
        kept.setdefault(text, place)
    border = len(texts.positives)
    return Record(
        texts.query,
        tuple(text for text, place in kept.items() if place < border),
        tuple(text for text, place in kept.items() if place >= border),
        texts.instruction,
        {
            name: tuple(value[place] for place in kept.values()) if isinstance(value, tuple) else value
            for name, value in columns.items()
        },
        texts.symmetric,
    )


def _get(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRow(f"missing key '{key}'")
    return row[key]


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    values = _get(row, key)
    if not isinstance(values, list):
        raise BadRow(f"'{key}' must be a list, not {type(values).__name__}")
    return values


def _texts(row: Mapping[str, Any], key: str) -> list[str]:
    return [_text(value, f"{key}[{i}]") for i, value in enumerate(_list(row, key))]


def _passages(row: Mapping[str, Any], key: str) -> list[str]:
    return [join_title(value, f"{key}[{i}]") for i, value in enumerate(_list(row, key))]


def join_title(passage: Any, where: str) -> str:
    """``title`` and ``text`` of a passage with a space between; the title may be missing, null or empty.

    Raises:
        BadRow: not an object, no ``text``, a wrong type, or nothing but white space.
    """
    if not isinstance(passage, Mapping):
        raise BadRow(f"'{where}' must be an object with title and text, not {type(passage).__name__}")
    if "text" not in passage:
        raise BadRow(f"missing key 'text' in '{where}'")
    title, text = passage.get("title") or "", passage["text"]
    for name, value in (("title", title), ("text", text)):
        if not isinstance(value, str):
            raise BadRow(f"'{where}.{name}' must be a text, not {type(value).__name__}")
    return _text(f"{title.strip()} {text.strip()}", where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"'{where}' must be a text, not {type(value).__name__}")
    value = value.strip()
    if not value:
        raise BadRow(f"'{where}' is an empty text")
    check_utf8(value, where)
    return value


def check_utf8(value: str, where: str) -> None:
    """Raises: BadRow: half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"'{where}' holds a character that cannot be written as UTF-8 ({error.reason})") from None
