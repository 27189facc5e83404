"""Texts with more tokens than the LLM has positions are refused before a forward reads beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ullme.token_rows import TokenRows


def check_rows(rows: TokenRows, targets: TokenRows | None, owner: np.ndarray | None, limit: int, llm: str) -> None:
    """What is embedded or scored has a position for each token.

    Args:
        rows: texts, or prompts of ``targets``.
        targets: what is scored after the prompts, or None.
        owner: the prompt of each target, or None.
        limit: positions of the LLM.
        llm: its name.

    Raises:
        ValueError: a text, or a prompt with its passage, is longer.
    """
    if rows.input_ids.shape[1] + (0 if targets is None else targets.input_ids.shape[1]) <= limit:
        return  # without looking at the lengths
    lengths = rows.host_masks.lengths
    if targets is not None:
        # a target's last token is predicted, and never run
        lengths = lengths[owner] + targets.host_masks.lengths - 1
    if len(lengths) and (longest := int(lengths.max())) > limit:
        what = "a text has" if targets is None else "a prompt and its passage together have"
        raise ValueError(
            f"{what} {longest} tokens, but {llm!r} has {limit} positions; cut texts at fewer tokens (query_max_length "
            "and passage_max_length of the data, max_length of encode)"
        )


def check_generation(prompt_tokens: int, options: Mapping[str, Any], limit: int, llm: str) -> None:
    """What is generated has a position for each token; generation is refused at once, not when it gets there.

    Args:
        prompt_tokens: padding included.
        options: of transformers' ``generate``; without ``max_new_tokens`` only the prompt is checked.
        limit: positions of the LLM.
        llm: its name.

    Raises:
        ValueError: the prompt, or the prompt and ``max_new_tokens``, has more tokens.
    """
    new = options.get("max_new_tokens") or 1
    if prompt_tokens + new - 1 > limit:  # the last token is drawn, and never run
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={new} do not fit the {limit} positions of {llm!r}; "
            f"cut the prompt, or generate at most {max(limit + 1 - prompt_tokens, 0)} tokens"
        )
