"""The prompt with which an LLM writes queries for documents: a few examples, and then the document (InPars,
arXiv 2202.05144; Promptagator, arXiv 2209.11755)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ullme.data.bad_row import BadRow
from ullme.data.jsonl import iter_lines, parse_line
from ullme.prompts import Prompts

INSTRUCTION = "Below are documents, each with a search query that it answers."
TEMPLATE = "Document: {document}\nSearch query: {query}"


class Example(NamedTuple):
    """A document and a query that it answers."""

    document: str
    query: str


EXAMPLES = (
    Example(
        "Bread dough rises because yeast eats the sugars in the flour and gives off carbon dioxide. The gas is held in "
        "small bubbles by gluten, a protein that kneading has stretched into a net. In a cold kitchen the yeast works "
        "slowly, and the same dough may need twice as long.",
        "why does bread dough rise slower in a cold kitchen",
    ),
    Example(
        "We compared three ways of storing harvested rainwater over one dry season. Water in covered concrete tanks "
        "held fewer bacteria after ninety days than water in plastic barrels, and opaque barrels did better than clear "
        "ones, in which algae grew within two weeks.",
        "effect of storage container on bacteria in harvested rainwater",
    ),
    Example(
        "The lighthouse on the northern cape was lit for the first time in 1861. Its lens, made in Paris, could be "
        "seen from twenty-two sea miles. The last keeper left in 1978, when the light was automated, and the building "
        "is a museum today.",
        "when was the northern cape lighthouse automated",
    ),
)


@dataclass(frozen=True)
class QueryPrompt:
    """What the LLM reads before it writes a query: the instruction, the examples and a document, with blank lines
    between them.

    Args:
        template: of an example and of the document: ``{document}`` once, and ``{query}`` once, at the end.
        instruction: stands in front; may be empty.
        examples: may be none.

    Raises:
        ValueError: a template without one of its placeholders or with others, or an example with a placeholder.
    """

    template: str = TEMPLATE
    instruction: str = INSTRUCTION
    examples: tuple[Example, ...] = EXAMPLES

    def __post_init__(self) -> None:
        counts = [self.template.count(place) for place in ("{document}", "{query}")]
        others = set(re.findall(r"\{(\w+)\}", self.template)) - {"document", "query"}
        if counts != [1, 1] or not self.template.endswith("{query}") or others:
            raise ValueError(
                f"--template {self.template!r} must hold {{document}} once and end with {{query}}, and no other "
                f"placeholder; write for example {TEMPLATE!r}"
            )
        for option, text in [
            ("--instruction", self.instruction),
            *(("--examples", t) for e in self.examples for t in e),
        ]:
            if found := re.search(r"\{(passage|query|instruction)\}", text):
                raise ValueError(
                    f"{option}: {text[:60]!r} holds {found[0]}, which is a placeholder; write it otherwise"
                )

    @property
    def contract(self) -> Prompts:
        """The prompt contract whose template ``query_generation`` is this prompt.

        White space in front of {query} is left out: a query's first token brings its own.
        """
        open_template = self.template.removesuffix("{query}").rstrip()
        shown = [f"{open_template.replace('{document}', e.document)} {e.query}" for e in self.examples]
        parts = [self.instruction, *shown, open_template.replace("{document}", "{passage}") + "{query}"]
        return Prompts(query_generation="\n\n".join(part for part in parts if part))

    def to_dict(self) -> dict[str, Any]:
        """JSON for the settings of a command."""
        return {**asdict(self), "examples": [list(example) for example in self.examples]}


def query_prompt(
    template: str | None = None, instruction: str | None = None, examples: str | Path | None = None
) -> QueryPrompt:
    """The default prompt with what the user gives in place of its parts.

    Args:
        template: see :class:`QueryPrompt`.
        instruction: likewise.
        examples: file of JSON lines of ``document`` and ``query``, or "none".
    """
    given: dict[str, Any] = {"template": template, "instruction": instruction}
    if examples is not None:
        given["examples"] = () if examples == "none" else tuple(read_examples(examples))
    return replace(QueryPrompt(), **{name: value for name, value in given.items() if value is not None})


def read_examples(file: str | Path) -> Sequence[Example]:
    """Raises: ValueError: no such file, no examples, or a bad line ("file:line: reason")."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--examples {file}: no such file; give JSON lines of document and query, or none")
    examples = []
    for number, _, line in iter_lines(path):
        try:
            row = parse_line(line)
            values = [row.get(name) for name in Example._fields] if isinstance(row, dict) else [None]
            if not all(isinstance(value, str) and value.strip() for value in values):
                raise BadRow("an example needs the texts 'document' and 'query'")
        except BadRow as reason:
            raise ValueError(f"{path}:{number}: {reason}") from None
        examples.append(Example(*(str(value).strip() for value in values)))
    if not examples:
        raise ValueError(f"--examples {file} holds no example; give some, or none")
    return examples
