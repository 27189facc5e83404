"""The prompt contract: templates that say how a text becomes a query, a passage or a prompt of generation."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Role = Literal["query", "passage", "generation", "query_generation"]
Pooled = Literal["all", "text"]


@dataclass(frozen=True)
class Prompts:
    """Templates for the two sides of retrieval. The defaults follow E5-mistral (arXiv 2401.00368), as the paper does.

    Args:
        query: template of a query; ``{text}`` stands for the query and ``{instruction}`` for the task. A query or
            passage template may hold {text} twice, as in echo embeddings (arXiv 2402.15449).
        passage: template of a passage.
        generation: template of the query in front of a passage whose likelihood log π(passage | query) is asked for;
            the passage's own tokens follow it. As in ``query_generation``, an end token right before what is scored is
            left out.
        query_generation: template for the likelihood log π(query | passage): ``{passage}`` stands for the passage and
            ``{query}``, at the end, for the query, whose own tokens are scored (arXiv 2204.07496).
        instruction: the task description that training uses, and evaluation where a task brings none of its own.
        append_eos: end every text with the tokenizer's ``eos_token`` (what last-token pooling usually wants). Nothing
            is added where the tokenizer puts an end token after every text by itself, whichever token that is.
        pooled: which tokens become the embedding. ``all``; or ``text``: the text, its last copy where there are two,
            and what follows it. Every token takes part in attention, so an instruction in front still steers the
            embedding (GritLM, arXiv 2402.09906; LLM2Vec, arXiv 2404.05961).

    Raises:
        ValueError: a template does not hold ``{text}`` (generation: exactly once; query_generation: ``{passage}`` once,
            and ``{query}`` once at its end), or holds another field than {instruction} beside it; or an unknown
            ``pooled``.
    """

    query: str = "Instruct: {instruction}\nQuery: {text}"
    passage: str = "{text}"
    generation: str = "Instruct: {instruction}\nQuery: {text}\nPassage:\n"
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    append_eos: bool = False
    pooled: Pooled = "all"
    query_generation: str = "Passage: {passage}\nA search query that this passage answers: {query}"

    def __post_init__(self) -> None:
        if self.pooled not in get_args(Pooled):
            raise ValueError(f"prompts.pooled={self.pooled!r}: choose {' or '.join(get_args(Pooled))}")
        for name in ("query", "passage", "generation"):
            template = getattr(self, name)
            allowed = {1: "exactly once"} if name == "generation" else {1: "once or twice", 2: ""}
            if template.count("{text}") not in allowed:
                raise ValueError(
                    f"prompts.{name}={template!r} must hold {{text}} {allowed[1]}; write for example '{name}: {{text}}'"
                )
            _check_placeholders(name, template, "text")
        template = self.query_generation
        if template.count("{passage}") != 1 or template.count("{query}") != 1 or not template.endswith("{query}"):
            raise ValueError(
                f"prompts.query_generation={template!r} must hold {{passage}} once and end with {{query}}, the text "
                "that is scored; write for example 'Passage: {passage}\\nQuery: {query}'"
            )
        _check_placeholders("query_generation", template, "passage", "query")

    def around(self, role: Role | None, instruction: str | None = None) -> tuple[str, ...]:
        """What stands before, after and, where it comes twice, between the text.

        ``role=None``: nothing; ``instruction=None``: the contract's own.
        """
        if role is None:
            return "", ""
        template: str = getattr(self, role)
        filled = self.instruction if instruction is None else instruction
        text = "{passage}" if role == "query_generation" else "{text}"
        parts = template.removesuffix("{query}").split(text)
        return tuple(part.replace("{instruction}", filled) for part in parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Prompts:
        """Raises: ValueError: a field this version does not know, so that no part of a contract is dropped unseen."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"prompts: unknown fields {unknown}; this version knows {sorted(known)}")
        return cls(**values)


def _check_placeholders(name: str, template: str, *known: str) -> None:
    """Raises: ValueError: a template holds another placeholder than ``known`` and the instruction."""
    if unknown := set(re.findall(r"\{(\w+)\}", template)) - {*known, "instruction"}:
        options = ", ".join(f"{{{field}}}" for field in known)
        raise ValueError(
            f"prompts.{name}={template!r}: unknown placeholder {{{min(unknown)}}}; use {options} or {{instruction}}"
        )
