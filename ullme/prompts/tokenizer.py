"""Texts to token ids under a prompt contract."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from ullme.prompts.contract import Prompts, Role
from ullme.token_rows import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def begin_and_end(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer puts before and after every text by itself; either may be none.

    They are found by trial: ``bos_token`` and ``eos_token`` do not tell (Qwen3-Embedding appends another token than its
    ``eos_token``), and no option does that all tokenizers have.

    Raises:
        ValueError: the tokenizer changes the text's own tokens as well, so that nothing can be said.
    """
    text, own = _a_text_with_tokens(tokenizer)
    whole: list[int] = tokenizer(text)["input_ids"]
    for n in range(len(whole) - len(own) + 1):
        if whole[n : n + len(own)] == own:
            return whole[:n], whole[n + len(own) :]
    raise ValueError(
        f"{type(tokenizer).__name__} reads {text!r} as {whole}, and as {own} with add_special_tokens=False; what it "
        "puts before and after a text must stand around the text's own tokens; use another tokenizer for this LLM"
    )


def _a_text_with_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """A text that the tokenizer does not read as nothing, and its token ids; without any such text, an empty one."""
    special = set(tokenizer.all_special_tokens)
    for texts in (lambda: ["a", "1"], tokenizer.get_vocab):  # a vocabulary takes long to list
        for text in texts():
            if text not in special and (own := tokenizer(text, add_special_tokens=False)["input_ids"]):
                return text, own
    return "", []


class PromptTokenizer:
    """Texts to token rows under a prompt contract.

    A row is: what the tokenizer puts before every text (the begin token), the text in its template, and what the
    tokenizer puts after every text (the end token) or, if that is nothing and ``append_eos`` is set, ``eos_token``. A
    template that begins or ends with these tokens itself has them once.

    Args:
        tokenizer: any transformers tokenizer with a pad token.
        prompts: the contract.

    Raises:
        ValueError: a template with white space outside of its begin or end token, which would come twice;
            ``append_eos`` with a tokenizer that has no end token; or see :func:`begin_and_end`.

    Attributes:
        begin: token ids before every text.
        end: token ids after every text, and not after a prompt of generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.begin, own_end = begin_and_end(tokenizer)
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._prompt_end = own_end or self._eos  # what a prompt of generation must not end with
        self.end = self._prompt_end if prompts.append_eos else own_end
        if prompts.append_eos and not self.end:
            raise ValueError(
                f"prompts.append_eos=true, and {type(tokenizer).__name__} has no eos_token and ends no text by itself; "
                "set the tokenizer's eos_token (in tokenizer_config.json), or prompts.append_eos=false"
            )
        self._tail_lengths: dict[str, int] = {}
        for role in get_args(Role):
            self.around(role)

    def around(self, role: Role | None, instruction: str | None = None) -> tuple[str, ...]:
        """:meth:`Prompts.around` without the begin and end tokens, which every row gets anyway.

        Raises:
            ValueError: white space outside of a begin or end token that the template has, which would come twice.
        """
        first, *others, last = self.prompts.around(role, instruction)
        before = self.tokenizer.convert_ids_to_tokens(self.begin)
        after = self.tokenizer.convert_ids_to_tokens(self._prompt_end if _is_generation(role) else self.end)
        for token in ("".join(before[n:]) for n in range(len(before))):
            if first.lstrip().startswith(token):
                _check_no_space(role, first, token, first.startswith(token))
                first = first.removeprefix(token)
                break
        for token in ("".join(after[:n]) for n in range(len(after), 0, -1)):
            # a prompt of generation gets no end token, so that one before white space stands there once
            if last.endswith(token) or (last.rstrip().endswith(token) and not _is_generation(role)):
                _check_no_space(role, last, token, last.endswith(token))
                last = last.removesuffix(token)
                break
        return first, *others, last

    def ids(
        self,
        texts: Sequence[str],
        role: Role | None,
        *,
        max_length: int | Sequence[int],
        instruction: str | Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """Token ids of each text in its template; see :meth:`rows`."""
        return self.rows(texts, role, max_length=max_length, instruction=instruction)[0]

    def rows(
        self,
        texts: Sequence[str],
        role: Role | None,
        *,
        max_length: int | Sequence[int],
        instruction: str | Sequence[str | None] | None = None,
    ) -> tuple[list[list[int]], list[int] | None]:
        """Token ids of each text in its template, at most ``max_length`` tokens each, and which of them are pooled.

        A text that is too long loses its own end: what the template puts after the text, and the end token, stay. In
        a template that holds the text twice both copies lose the same. A prompt of generation (``role`` generation or
        query_generation) is open for what is scored to follow: it has no end token.

        Args:
            texts: R texts.
            role: which template; None for the bare text.
            max_length: in tokens, template included; one for all, or one for each text.
            instruction: one for all, one for each text, or None for the contract's own.

        Returns:
            R rows of token ids, and for each the place of the first token that is pooled (the rest of the row is), or
            None if all tokens are.

        Raises:
            ValueError: ``pooled: text`` with a tokenizer that cannot say where a token came from.
        """
        if not texts:
            return [], None
        end = [] if _is_generation(role) else self.end
        one = instruction is None or isinstance(instruction, str)
        each: list[Any] = [instruction] * len(texts) if one else list(instruction or ())
        around = {i: self.around(role, i) for i in set(each)}
        rendered = [text.join(around[i]) for text, i in zip(texts, each, strict=True)]
        tails = {i: self._tail_length(pieces[-1]) + len(end) for i, pieces in around.items()}
        masks_pooling = self.prompts.pooled == "text" and role in ("query", "passage")
        encoded = self._encode(rendered, masks_pooling)
        limits = [max_length] * len(texts) if isinstance(max_length, int) else list(max_length)
        rooms = [limit - len(self.begin) - len(end) for limit in limits]
        long = [n for n, row in enumerate(encoded["input_ids"]) if len(row) > rooms[n] and len(around[each[n]]) > 2]
        if long:
            texts = list(texts)
            for n in long:
                texts[n] = self._shortened(texts[n], around[each[n]], rooms[n])
                rendered[n] = texts[n].join(around[each[n]])
            encoded = self._encode(rendered, masks_pooling)
        rows = [[*self.begin, *row, *end] for row in encoded["input_ids"]]
        starts = None
        if masks_pooling:
            ends = [len(whole) - len(around[i][-1]) for whole, i in zip(rendered, each, strict=True)]
            firsts = [last - len(text) for last, text in zip(ends, texts, strict=True)]
            places = zip(encoded["offset_mapping"], firsts, strict=True)
            starts = [len(self.begin) + _token_at(*place) for place in places]
        for n, row in enumerate(rows):
            if len(row) > limits[n]:
                keep = min(tails[each[n]], limits[n] - 1)
                row = row[: limits[n] - keep] + row[len(row) - keep :]  # noqa: PLW2901
            # A tokenizer without special tokens turns "" into nothing; one token stands in, so that it can be pooled.
            rows[n] = row or list(self._eos) or [self.tokenizer.pad_token_id]
        if starts is not None:  # an empty text may leave nothing behind its template
            starts = [min(start, len(row) - 1) for start, row in zip(starts, rows, strict=True)]
        return rows, starts

    def _encode(self, texts: list[str], offsets: bool) -> Any:
        if offsets and not self.tokenizer.is_fast:
            raise ValueError(
                "prompts.pooled=text needs a tokenizer that knows which characters a token stands for (a fast one), "
                f"and {type(self.tokenizer).__name__} does not; set prompts.pooled=all"
            )
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            **({"return_offsets_mapping": True} if offsets else {}),
        )

    def _shortened(self, text: str, pieces: tuple[str, ...], max_length: int) -> str:
        """The longest beginning of a text with which its template has at most ``max_length`` tokens, without begin and
        end token."""
        fits, beyond = 0, len(text)
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if len(self._bare(text[:middle].join(pieces))) <= max_length:
                fits = middle
            else:
                beyond = middle
        return text[:fits]

    def check_length(
        self, role: Role, max_length: int, instruction: str | None = None, option: str | None = None
    ) -> None:
        """Check that a template leaves room for a text.

        Args:
            role: of the template.
            max_length: in tokens, template included.
            instruction: None for the contract's own.
            option: that says the length, for the message; None: the role's (``query_max_length``).

        Raises:
            ValueError: the template alone takes ``max_length`` tokens, so that all texts would be the same.
        """
        empty = len(self.ids([""], role, max_length=2**31, instruction=instruction)[0])
        if empty >= max_length and any(self.prompts.around(role, instruction)):
            with_it = "" if instruction is None else f" with the instruction {instruction[:60]!r}"
            raise ValueError(
                f"{role}: max_length={max_length} tokens, but the template alone{with_it} takes {empty}; raise "
                f"{option or f'{role}_max_length'} (or max_length), or shorten prompts.{role} or the instruction"
            )

    def _tail_length(self, tail: str) -> int:
        """Tokens of what a template puts after a text. Not of the tail alone: sentencepiece would begin it with ▁."""
        if tail not in self._tail_lengths:
            # behind two texts, since a tokenizer may join the tail's first characters with one of them
            added = (len(self._bare(text + tail)) - len(self._bare(text)) for text in ("a", "1"))
            self._tail_lengths[tail] = max(added)
        return self._tail_lengths[tail]

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def prompt_ids(
        self,
        texts: Sequence[str],
        *,
        max_length: int | Sequence[int],
        instruction: str | Sequence[str | None] | None = None,
        role: Literal["generation", "query_generation"] = "generation",
    ) -> list[list[int]]:
        """Token ids of each text in a template of generation, open for what is scored to follow: without an end token.

        Args:
            texts: R queries, for ``role="generation"``, or R passages, for ``role="query_generation"``.
            max_length: in tokens, template included; a text that is too long loses its own end.
            instruction: as for :meth:`rows`.
            role: which template.
        """
        return self.ids(texts, role, max_length=max_length, instruction=instruction)

    def prompt_overheads(
        self, role: Literal["generation", "query_generation"], instructions: Sequence[str | None]
    ) -> list[int]:
        """Tokens of a template of generation without its text, with each of the instructions."""
        own = list(dict.fromkeys(instructions))
        prompts = self.prompt_ids([""] * len(own), max_length=2**31, instruction=own, role=role)
        length = dict(zip(own, map(len, prompts), strict=True))
        return [length[instruction] for instruction in instructions]

    def prompt_overhead(
        self, role: Literal["generation", "query_generation"], instructions: Sequence[str | None] = (None,)
    ) -> int:
        """The most tokens of a template of generation without its text, with any of the instructions."""
        return max(self.prompt_overheads(role, instructions))

    def target_ids(self, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
        """Token ids of each text alone and, unless the text was cut at ``max_length`` tokens, ``eos_token``.

        That is where the LLM stops generating, so its likelihood is asked for even where the tokenizer ends the texts
        that are embedded in another token. Without an ``eos_token`` the tokenizer's own end stands in.
        """
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        stop = self._eos or self._prompt_end
        return [(row + stop)[:max_length] or [self.tokenizer.pad_token_id] for row in rows]

    def pad(self, rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> TokenRows:
        """Right-padded (R, L) block of token rows; the packed forward drops the padding again.

        Args:
            rows: token ids.
            starts: the first token of each row that is pooled; None pools all.
        """
        return pad_rows(rows, self.tokenizer.pad_token_id, starts)

    def __call__(
        self,
        texts: Sequence[str],
        role: Role | None,
        *,
        max_length: int,
        instruction: str | Sequence[str | None] | None = None,
    ) -> TokenRows:
        """:meth:`rows`, padded."""
        return self.pad(*self.rows(texts, role, max_length=max_length, instruction=instruction))


def _check_no_space(role: Role | None, part: str, token: str, is_outermost: bool) -> None:
    """Raises: ValueError: white space stands outside of the begin or end token in a part of a template."""
    if not is_outermost:
        raise ValueError(
            f"prompts.{role} has white space outside of {token!r} ({part!r}): every row gets {token!r} there by "
            f"itself, and would have it twice; leave out the white space, or {token!r} as well"
        )


def _is_generation(role: Role | None) -> bool:
    return role in ("generation", "query_generation")


def _token_at(offsets: Sequence[tuple[int, int]], place: int) -> int:
    """The first token with a character at or after ``place``; special tokens stand for none."""
    return next((n for n, (_, end) in enumerate(offsets) if end > place), len(offsets))


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int, starts: Sequence[int] | None = None) -> TokenRows:
    """(R, L) block with padding on the right; ``starts`` (R,) is where each row's pooled tokens begin."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    places = torch.arange(max(map(len, rows), default=0))
    real = places < lengths[:, None]
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    input_ids = torch.full(real.shape, pad_token_id, dtype=torch.long)
    input_ids[real] = torch.from_numpy(flat)
    if starts is None:
        return TokenRows(input_ids, real.long())
    return TokenRows(input_ids, real.long(), (real & (places >= torch.tensor(starts)[:, None])).long())
