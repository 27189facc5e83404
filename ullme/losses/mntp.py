"""Masked next-token prediction (MNTP, arXiv 2404.05961): trains a causal LLM to use bidirectional attention."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ullme.losses.base import Chunk, ChunkLoss
from ullme.prompts import begin_and_end
from ullme.token_rows import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Replacement = Literal["mask", "bert"]


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

    def mask(self, rows: TokenRows, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenRows, Tensor]:
        """Mask tokens at random.

        Args:
            rows: R rows.
            tokenizer: whose vocabulary they are in.

        Returns:
            The rows with tokens replaced, and (R, L) the masked tokens, -100 elsewhere.
        """
        ids, real = rows.input_ids, rows.attention_mask.bool()
        first = real & (real.cumsum(1) == 1)
        # what a tokenizer puts around a text need not be among those that it calls special
        fixed = [*tokenizer.all_special_ids, *chain.from_iterable(begin_and_end(tokenizer))]
        special = torch.isin(ids, torch.tensor(fixed, dtype=ids.dtype, device=ids.device))
        maskable = real & ~first & ~special
        uniform = torch.rand(ids.shape, device=ids.device).masked_fill(~maskable, 2.0)
        chosen = uniform < self.share
        # where the share gives a text no token, the one with the smallest number
        lowest = torch.zeros_like(maskable).scatter(1, uniform.argmin(1, keepdim=True), True)
        chosen = chosen | (lowest & maskable & ~chosen.any(1, keepdim=True))
        replacement = torch.full_like(ids, self.mask_token_id(tokenizer))
        if self.replacement == "bert":
            uniform = torch.rand(ids.shape, device=ids.device)
            random_tokens = torch.randint_like(ids, len(tokenizer))
            replacement = torch.where(uniform < 0.8, replacement, torch.where(uniform < 0.9, random_tokens, ids))
        replaced = TokenRows(torch.where(chosen, replacement, ids), rows.attention_mask, host=rows.host)
        return replaced, ids.masked_fill(~chosen, -100)

    def forward(self, chunk: Chunk) -> Tensor:
        assert chunk.masked_logps is not None
        return -chunk.masked_logps
