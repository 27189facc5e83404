"""The prompt contract: the one place that says how a text becomes token ids.

Training, evaluation and export all go through :class:`PromptTokenizer`, and the contract is stored with every
checkpoint, so that a model never meets another format at inference than it saw in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ullme.batch import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["query", "passage", "generation"]


@dataclass(frozen=True)
class Prompts:
    """Templates for the two sides of retrieval. The defaults follow E5-mistral (arXiv 2401.00368), as the paper does.

    Args:
        query: template of a query; ``{text}`` stands for the query and ``{instruction}`` for the task.
        passage: template of a passage.
        generation: template of the query in front of a passage whose likelihood is asked for; the passage's own tokens
            follow it.
        instruction: the task description that training uses, and evaluation where a task brings none of its own.
        append_eos: end every text with the tokenizer's end token (what last-token pooling usually wants).

    Raises:
        ValueError: a template does not hold ``{text}`` exactly once, or another field than {instruction} beside it.
    """

    query: str = "Instruct: {instruction}\nQuery: {text}"
    passage: str = "{text}"
    generation: str = "Instruct: {instruction}\nQuery: {text}\nPassage:\n"
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    append_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("query", "passage", "generation"):
            template = getattr(self, name)
            if template.count("{text}") != 1:
                raise ValueError(
                    f"prompts.{name}={template!r} must hold {{text}} exactly once; write for example '{name}: {{text}}'"
                )
            if unknown := set(re.findall(r"\{(\w+)\}", template)) - {"text", "instruction"}:
                raise ValueError(
                    f"prompts.{name}={template!r} holds {{{min(unknown)}}}, which nothing is put in for; "
                    "a template knows {text} and {instruction}"
                )

    def around(self, role: Role | None, instruction: str | None = None) -> tuple[str, str]:
        """What stands before and after the text. ``role=None``: nothing; ``instruction=None``: the contract's own."""
        if role is None:
            return "", ""
        template: str = getattr(self, role)
        prefix, suffix = template.split("{text}")
        filled = self.instruction if instruction is None else instruction
        return prefix.replace("{instruction}", filled), suffix.replace("{instruction}", filled)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Prompts:
        """Raises: ValueError: a field this version does not know, so that no part of a contract is dropped unseen."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"prompts: unknown fields {unknown}; this version knows {sorted(known)}")
        return cls(**values)


class PromptTokenizer:
    """Texts to token rows under a prompt contract.

    Args:
        tokenizer: any transformers tokenizer with a pad token.
        prompts: the contract.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts

    def ids(
        self,
        texts: Sequence[str],
        role: Role | None,
        *,
        max_length: int,
        instruction: str | Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """Token ids of each text in its template, at most ``max_length`` tokens each.

        A text that is too long loses its own end: what the template puts after the text, and the end token, stay.

        Args:
            texts: R texts.
            role: which template; None for the bare text.
            max_length: in tokens, template included.
            instruction: one for all, one for each text, or None for the contract's own.
        """
        if not texts:
            return []
        one_for_all = instruction is None or isinstance(instruction, str)
        each = [instruction] * len(texts) if one_for_all else list(instruction)  # type: ignore[arg-type]
        around = {i: self.prompts.around(role, i) for i in set(each)}
        rendered = [text.join(around[i]) for text, i in zip(texts, each, strict=True)]
        tails = {i: self._length(after) for i, (_, after) in around.items()}
        rows: list[list[int]] = self.tokenizer(rendered, return_attention_mask=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        for n, row in enumerate(rows):
            has_end = bool(row) and row[-1] == end
            if self.prompts.append_eos and end is not None and not has_end:
                row, has_end = [*row, end], True  # noqa: PLW2901
            if len(row) > max_length:
                keep = min(tails[each[n]] + has_end, max_length - 1)
                row = row[: max_length - keep] + row[len(row) - keep :]  # noqa: PLW2901
            # A tokenizer without special tokens turns "" into nothing; one token stands in, so that it can be pooled.
            rows[n] = row or [end if end is not None else self.tokenizer.pad_token_id]
        return rows

    def check_length(self, role: Role, max_length: int) -> None:
        """Raises: ValueError: the template alone takes ``max_length`` tokens, so that all texts would be the same."""
        empty = len(self.ids([""], role, max_length=2**31)[0])
        if empty >= max_length and (self.prompts.around(role) != ("", "")):
            raise ValueError(
                f"{role}: max_length={max_length} tokens, but the template alone takes {empty}; raise "
                f"{role}_max_length (or max_length), or shorten prompts.{role} or the instruction"
            )

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0

    def prompt_ids(
        self, queries: Sequence[str], *, max_length: int, instruction: str | Sequence[str | None] | None = None
    ) -> list[list[int]]:
        """Token ids of each query in the generation template, open for a passage to follow: without an end token."""
        rows = self.ids(queries, "generation", max_length=max_length, instruction=instruction)
        end = self.tokenizer.eos_token_id
        return [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]

    def target_ids(self, passages: Sequence[str], *, max_length: int) -> list[list[int]]:
        """Token ids of each passage alone, and its end token unless the passage was cut at ``max_length`` tokens."""
        if not passages:
            return []
        rows: list[list[int]] = self.tokenizer(list(passages), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [(row + end)[:max_length] or [self.tokenizer.pad_token_id] for row in rows]

    def pad(self, rows: Sequence[Sequence[int]]) -> TokenRows:
        """Right-padded (R, L) block of token rows; the packed forward drops the padding again."""
        return pad_rows(rows, self.tokenizer.pad_token_id)

    def __call__(
        self,
        texts: Sequence[str],
        role: Role | None,
        *,
        max_length: int,
        instruction: str | Sequence[str | None] | None = None,
    ) -> TokenRows:
        """:meth:`ids`, padded."""
        return self.pad(self.ids(texts, role, max_length=max_length, instruction=instruction))


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int) -> TokenRows:
    """(R, L) block with padding on the right."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    real = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    input_ids = torch.full(real.shape, pad_token_id, dtype=torch.long)
    input_ids[real] = torch.from_numpy(flat)
    return TokenRows(input_ids, real.long())
