"""Masked next-token prediction (MNTP, arXiv 2404.05961): trains a causal LLM to use bidirectional attention."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ullme.losses.base import Chunk, ChunkLoss
from ullme.prompts import begin_and_end
from ullme.token_rows import TokenRows
from ullme.utils.counter_random import random_bits, random_uniform
from ullme.utils.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Replacement = Literal["mask", "bert"]
# What a token's random numbers are for; another use is another counter, so that they are independent of each other.
_CHOICE, _REPLACEMENT, _TOKEN = range(3)


class MNTP(ChunkLoss):
    """−log π of masked tokens given all others, read off the position before each (LLM2Vec, arXiv 2404.05961).

    A mean over a text's masked tokens, then over texts. The texts are the queries of the batch.

    Args:
        share: of a text's tokens that are masked; at least one is, never its first (nothing stands before it) nor a
            special token.
        mask_token: what stands in for a masked token; a token that the vocabulary has.
        replacement: ``mask`` puts it in place of every masked token; ``bert`` of 80 % of them, a random token in
            place of 10 %, and leaves 10 % as they are (arXiv 1810.04805).
        weight: λ.

    Raises:
        ValueError: a share out of range or an unknown replacement.
    """

    name = "mntp"
    uses_generation = False
    needs_negatives = False
    needs_positive = False

    def __init__(
        self, share: float = 0.2, mask_token: str = "_", replacement: Replacement = "bert", weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if not 0 < share <= 1:
            raise ValueError(f"MNTP.share={share}: must be above 0 and at most 1")
        if replacement not in get_args(Replacement):
            raise ValueError(f"MNTP.replacement={replacement!r}: choose {' or '.join(get_args(Replacement))}")
        self.share = share
        self.mask_token = mask_token
        self.replacement: Replacement = replacement

    def mask_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Raises: ValueError: the mask token is not one token of the vocabulary."""
        # not get_vocab(), which lists 100,000 tokens in every chunk
        token_id: Any = tokenizer.convert_tokens_to_ids(self.mask_token)
        if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != self.mask_token:
            raise ValueError(
                f"MNTP.mask_token={self.mask_token!r} is no token of this LLM; name one that is rare in texts, "
                "such as _ or a reserved token"
            )
        return token_id

    def mask(
        self, rows: TokenRows, tokenizer: PreTrainedTokenizerBase, seed: Tensor | int, first_row: int = 0
    ) -> tuple[TokenRows, Tensor]:
        """Mask tokens at random.

        A row's masks are a function of the seed, the row's number and its tokens, whatever rows are with it; so they
        depend neither on chunks nor on the number of ranks.

        Args:
            rows: R rows.
            tokenizer: whose vocabulary they are in.
            seed: () int64, another one in every step.
            first_row: the first row's number in the global batch.

        Returns:
            The rows with tokens replaced, and (R, L) the masked tokens, -100 elsewhere.
        """
        ids, real = rows.input_ids, rows.attention_mask.bool()
        position = real.cumsum(1)  # from 1, padding aside
        # what a tokenizer puts around a text need not be among those that it calls special
        fixed = {*tokenizer.all_special_ids, *chain.from_iterable(begin_and_end(tokenizer))}
        (special,) = to_device([np.array(sorted(fixed), dtype=np.int64)], ids.device)
        maskable = real & (position > 1) & ~torch.isin(ids, special)
        number = torch.arange(first_row, first_row + len(rows), device=ids.device)[:, None]

        def uniform(use: int) -> Tensor:
            return random_uniform(seed, number, position, torch.full_like(position, use))

        choice = uniform(_CHOICE).masked_fill(~maskable, 2.0)
        chosen = choice < self.share
        # where the share gives a text no token, the one with the smallest number
        lowest = torch.zeros_like(maskable).scatter(1, choice.argmin(1, keepdim=True), True)
        chosen = chosen | (lowest & maskable & ~chosen.any(1, keepdim=True))
        replacement = torch.full_like(ids, self.mask_token_id(tokenizer))
        if self.replacement == "bert":
            kind = uniform(_REPLACEMENT)
            random_tokens = random_bits(seed, number, position, torch.full_like(position, _TOKEN)) % len(tokenizer)
            replacement = torch.where(kind < 0.8, replacement, torch.where(kind < 0.9, random_tokens, ids))
        replaced = TokenRows(torch.where(chosen, replacement, ids), rows.attention_mask, host=rows.host)
        return replaced, ids.masked_fill(~chosen, -100)

    def forward(self, chunk: Chunk) -> Tensor:
        assert chunk.masked_logps is not None
        return -chunk.masked_logps
