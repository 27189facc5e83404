"""How likely the pre-trained LLM finds queries after passages: query likelihood (UPR, arXiv 2204.07496)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ullme.models.encoding import token_batches
from ullme.utils.modes import evaluation_mode

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

# Tokens of a forward by device type.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@torch.no_grad()
def mean_query_logps(
    model: ULLME, pairs: Sequence[tuple[str, str]], *, passage_max_length: int = 256, query_max_length: int = 64
) -> np.ndarray:
    """log π(query | passage) / (tokens of the query), with the adapter off, in the prompt contract's template.

    Args:
        model: whose LLM.
        pairs: n pairs of query and passage.
        passage_max_length: tokens of a passage; the template's are not counted.
        query_max_length: tokens of a query.

    Returns:
        (n,) float64 in nats a token, in the order of the pairs.
    """
    tokenizer = model.prompt_tokenizer
    limit = tokenizer.prompt_overhead("query_generation") + passage_max_length
    prompts = tokenizer.prompt_ids([passage for _, passage in pairs], max_length=limit, role="query_generation")
    targets = tokenizer.target_ids([query for query, _ in pairs], max_length=query_max_length)
    lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    found = np.empty(len(pairs))
    with evaluation_mode(model), model.pretrained():
        for batch in token_batches(lengths, _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cuda"])):
            rows = tokenizer.pad([prompts[n] for n in batch]).to(model.device)
            scored = tokenizer.pad([targets[n] for n in batch]).to(model.device)
            likelihood = model(rows.input_ids, rows.attention_mask, is_generate=True, targets=scored, host=rows.host)
            found[batch] = (likelihood.logps.double() / likelihood.lengths).cpu().numpy()
    return found
