"""Write queries for the documents of a corpus with an LLM, in parts that are each on the disk whole or not at all.

What is written for a document depends on the LLM, the prompt, the seed and the document. A part is a fixed list of
documents in fixed batches, so a command that was stopped writes the missing parts with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ullme.query_generation.prompt import QueryPrompt
from ullme.search.corpus import Corpus, CorpusPlan, Document
from ullme.utils.part_files import PartFiles

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

# Documents of a part.
PART_DOCUMENTS = 64
# Called after each batch with its number of documents.
OnDocuments = Callable[[int], Any]


class WrittenQuery(NamedTuple):
    """A query, the id of the document that it was written for, and its number among that document's."""

    document: str
    number: int
    text: str


@dataclass(frozen=True)
class WriteSettings:
    """How queries are written.

    Args:
        prompt: what the LLM reads.
        per_document: queries for each document.
        max_documents: draw so many documents at random; None takes all.
        document_max_length: tokens of a document that the LLM reads.
        max_new_tokens: of a query.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_p: of the likeliest tokens only as many as have this probability together (arXiv 1904.09751).
        seed: of all draws.
        batch_size: documents that are read at once; it changes no more than the last bits of a probability.
    """

    prompt: QueryPrompt = field(default_factory=QueryPrompt)
    per_document: int = 1
    max_documents: int | None = None
    document_max_length: int = 256
    max_new_tokens: int = 32
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    batch_size: int = 16

    def check(self) -> None:
        """Raises: ValueError: a value out of range."""
        for name in ("per_document", "max_documents", "document_max_length", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must not be negative")
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature} must not be negative; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be above 0 and at most 1")
        if self.temperature == 0 and self.per_document > 1:
            raise ValueError(
                f"--temperature 0 writes the same query each time; give --per_document 1 and not {self.per_document}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Option -> value, as JSON; what is written depends on each of them."""
        options = {f"--{name}": value for name, value in asdict(self).items() if name != "prompt"}
        return {**options, "prompt": self.prompt.to_dict()}


class QueryWriter(Protocol):
    """Writes queries for documents."""

    def fingerprint(self) -> str:
        """Identifies the writer: another fingerprint, such as that of another LLM, may write other queries."""
        ...

    def write(self, documents: Sequence[Document], settings: WriteSettings, done: OnDocuments) -> list[WrittenQuery]:
        """``settings.per_document`` queries for each document, in the documents' order; one may be empty."""
        ...


class LLMQueryWriter:
    """The pre-trained LLM of a model.

    Args:
        model: its adapter, if there is one, is switched off.

    Raises:
        ValueError: the LLM was stored without its language-model head.
    """

    def __init__(self, model: ULLME) -> None:
        from ullme.models.likelihood import check_stored_head
        from ullme.models.sampling import ending_tokens

        check_stored_head(model.causal_lm)
        self.model = model
        head = model.causal_lm.get_output_embeddings()
        others = getattr(model.causal_lm.generation_config, "eos_token_id", None)
        others = others if isinstance(others, list) else [others]
        self._ends = ending_tokens(model.tokenizer, head.weight.shape[0], others)

    def fingerprint(self) -> str:
        return self.model.fingerprint

    def room(self, settings: WriteSettings) -> int:
        """The tokens of a document for which the LLM's positions leave room; 0 or less for none."""
        return self.model.max_positions - self._overhead(settings) - settings.max_new_tokens

    def _overhead(self, settings: WriteSettings) -> int:
        return self._tokenizer(settings).prompt_overhead("query_generation")

    def check(self, settings: WriteSettings) -> None:
        """Raises: ValueError: the prompt, a document and a query together have more tokens than the LLM's positions."""
        if settings.document_max_length > self.room(settings):
            overhead = self._overhead(settings)
            asked = overhead + settings.document_max_length + settings.max_new_tokens
            raise ValueError(
                f"the prompt's {overhead} tokens, --document_max_length {settings.document_max_length} and "
                f"--max_new_tokens {settings.max_new_tokens} are {asked} tokens, and the LLM has "
                f"{self.model.max_positions} positions; give a shorter document, or fewer --examples"
            )

    def write(self, documents: Sequence[Document], settings: WriteSettings, done: OnDocuments) -> list[WrittenQuery]:
        from ullme.models.prefix_cache import encode_prefix
        from ullme.models.sampling import sample_lines

        tokenizer = self._tokenizer(settings)
        limit = self._overhead(settings) + settings.document_max_length
        texts = [document.text for document in documents]
        rows = tokenizer.prompt_ids(texts, max_length=limit, role="query_generation")
        longest = max(map(len, rows), default=0) + settings.max_new_tokens
        prefix = encode_prefix(self.model, rows, longest)  # of this part alone, so a part depends on no other
        options = (self._ends, settings.temperature, settings.top_p, prefix)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]), reverse=True)
        found: dict[tuple[int, int], str] = {}
        for low in range(0, len(order), settings.batch_size):
            batch = order[low : low + settings.batch_size]
            for number in range(settings.per_document):
                uniforms = np.stack([random_numbers(documents[n].id, number, settings) for n in batch])
                lines = sample_lines(self.model, [rows[n] for n in batch], uniforms, *options)
                found.update(((n, number), line) for n, line in zip(batch, lines, strict=True))
            done(len(batch))
        return [WrittenQuery(documents[n].id, number, found[n, number]) for n, number in sorted(found)]

    def _tokenizer(self, settings: WriteSettings) -> Any:
        from ullme.prompts import PromptTokenizer

        return PromptTokenizer(self.model.tokenizer, settings.prompt.contract)


def random_numbers(document: str, number: int, settings: WriteSettings) -> np.ndarray:
    """(max_new_tokens,) float64 from 0 to below 1, of a document's query: they depend on nothing but the seed, the
    document's id and the number of the query."""
    key = int.from_bytes(hashlib.sha256(document.encode()).digest()[:16], "little")
    return np.random.default_rng([settings.seed, key, number]).random(settings.max_new_tokens)


def write_parts(
    writer: QueryWriter, corpus: Corpus, plan: CorpusPlan, folder: Path, settings: WriteSettings, done: OnDocuments
) -> int:
    """Write the parts that a folder lacks.

    Args:
        writer: of the queries.
        corpus: with the documents.
        plan: the corpus's, by :func:`~ullme.search.corpus.check_corpus`.
        folder: new, or of an earlier call with the same writer, corpus and settings.
        settings: how to write.
        done: called with the number of documents after each batch, and for each part that was there.

    Returns:
        The number of documents.

    Raises:
        ValueError: a value out of range, a folder of other queries, or a disk that cannot be written.
    """
    settings.check()
    parts = PartFiles(folder, "queries")
    parts.check({"LLM": writer.fingerprint(), "corpus": plan.sha256, **settings.to_dict()})
    documents = 0
    for number, part in enumerate(_parts(corpus, plan, settings)):
        documents += len(part)
        if parts.path(number).exists():
            done(len(part))
            continue
        lines = [json.dumps(query, ensure_ascii=False) + "\n" for query in writer.write(part, settings, done)]
        parts.write(number, "".join(lines))
    return documents


def chosen_documents(plan: CorpusPlan, settings: WriteSettings) -> int:
    """How many documents queries are written for, at the most: those without text get none."""
    return min(plan.documents, settings.max_documents or plan.documents)


def _parts(corpus: Corpus, plan: CorpusPlan, settings: WriteSettings) -> Iterator[list[Document]]:
    """The chosen documents with a text, in the order of the corpus, :data:`PART_DOCUMENTS` at a time."""
    chosen = None
    if chosen_documents(plan, settings) < plan.documents:
        drawn = np.random.default_rng(settings.seed).choice(plan.documents, settings.max_documents, replace=False)
        chosen = set(drawn.tolist())
    part: list[Document] = []
    for number, (_, document) in enumerate(corpus.documents()):
        if document.text and (chosen is None or number in chosen):
            part.append(document)
        if len(part) == PART_DOCUMENTS:
            yield part
            part = []
    if part:
        yield part


def read_parts(folder: Path) -> Iterator[list[WrittenQuery]]:
    """The queries of one part after the other, as they were written."""
    parts, number = PartFiles(folder, "queries"), 0
    while (path := parts.path(number)).exists():
        yield [WrittenQuery(*json.loads(line)) for line in path.read_bytes().splitlines()]
        number += 1
