"""Sample continuations from an LLM, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ullme.batch import TokenRows
from ullme.utils.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ullme.models.ullme import ULLME


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One token a row, by the inverse of the distribution function: the first token, in the order of the vocabulary, at
    which the summed probability exceeds the row's random number.

    So a row needs one random number a token, whatever rows are beside it, and rounding in the logits changes the token
    only where the number is that close to a border.

    Args:
        logits: (R, V), -inf for tokens that cannot come.
        uniforms: (R,) float64, from 0 to below 1.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: of the likeliest tokens only as many as have this probability together (arXiv 1904.09751); 1 for all.

    Returns:
        (R,) token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(ordered).scatter(-1, places, ordered.masked_fill(before >= top_p, 0))
    summed = probabilities.cumsum(-1)
    # rounding must not make the number the sum of all, above which there is no token
    numbers = torch.minimum(uniforms * summed[:, -1], torch.nextafter(summed[:, -1], torch.zeros_like(uniforms)))
    return torch.searchsorted(summed, numbers[:, None], right=True)[:, 0]


def ending_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, others: Sequence[int] = ()) -> Tensor:
    """(V,) bool, the tokens that end a line of text: those that hold a line break, and the end token.

    Args:
        tokenizer: of the LLM.
        vocabulary: V, rows of the LM head; it may have more than the tokenizer has tokens.
        others: ids of other end tokens.
    """
    texts = tokenizer.batch_decode([[n] for n in range(min(vocabulary, len(tokenizer)))])
    ends = torch.zeros(vocabulary, dtype=torch.bool)
    ends[: len(texts)] = torch.tensor(["\n" in text for text in texts])
    for token in {tokenizer.eos_token_id, *others} - {None}:
        ends[token] = True
    return ends


@torch.no_grad()
def sample_lines(
    model: ULLME,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    ends: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[str]:
    """Continue prompts up to the end of the line: transformers' ``generate``, with its KV cache, as one batch.

    The adapter is off: the pre-trained LLM writes.

    Args:
        model: whose LLM.
        prompts: R rows of token ids.
        uniforms: (R, T) float64 from 0 to below 1, one for each of at most T new tokens.
        ends: (V,) bool, see :func:`ending_tokens`. The first token is none of them.
        temperature: see :func:`draw`.
        top_p: likewise.

    Returns:
        R texts in one line each, stripped.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    tokenizer, device = model.tokenizer, model.device
    rows = _left_padded(prompts, tokenizer.pad_token_id).to(device)
    width = rows.input_ids.shape[1]
    numbers, ends = torch.from_numpy(uniforms).to(device), ends.to(device)

    def choose(tokens: Tensor, logits: Tensor) -> Tensor:
        if tokens.shape[1] == width:
            logits = logits.masked_fill(ends, float("-inf"))
        chosen = draw(logits, numbers[:, tokens.shape[1] - width], temperature, top_p)
        return torch.full_like(logits, float("-inf")).scatter(1, chosen[:, None], 0.0)

    def ended(tokens: Tensor, logits: Any, **_: Any) -> Tensor:
        return ends[tokens[:, -1]]

    with evaluation_mode(model), model.pretrained():
        found = model.generate(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=uniforms.shape[1],
                do_sample=False,  # `choose` leaves one token
                num_beams=1,
                repetition_penalty=1.0,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([ended]),
        )
    return [_first_line(row, tokenizer, ends) for row in found[:, width:].cpu()]


def _first_line(tokens: Tensor, tokenizer: PreTrainedTokenizerBase, ends: Tensor) -> str:
    """The text before the first line break. A token may hold characters in front of the break."""
    at_end = ends.cpu()[tokens].nonzero()
    kept = tokens[: int(at_end[0, 0]) + 1] if len(at_end) else tokens
    text: Any = tokenizer.decode(kept, skip_special_tokens=True)
    lines = text.strip().splitlines()
    return " ".join(lines[0].split()) if lines else ""


def _left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> TokenRows:
    """(R, L) block with padding on the left, behind which every row goes on."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return TokenRows(ids, mask)
