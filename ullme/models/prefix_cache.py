"""The KV cache of tokens with which several prompts begin, so that a language model reads them once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from ullme.models.attention.rotary import length_key
from ullme.utils.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullme.models.ullme import ULLME

# Fewer shared tokens are not worth the copies of their cache.
MIN_TOKENS = 16


@dataclass(frozen=True)
class Prefix:
    """Tokens with which prompts begin, and what the pre-trained LLM keeps of them.

    Args:
        tokens: P token ids.
        cache: transformers' DynamicCache of them, for one row.
    """

    tokens: tuple[int, ...]
    cache: Any

    def repeated(self, rows: int) -> Any:
        """A cache of its own for ``rows`` prompts, to which generation appends."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens with which all prompts begin, at least one token of each left over."""
    if not prompts:
        return ()
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


@torch.no_grad()
def encode_prefix(model: ULLME, prompts: Sequence[Sequence[int]], max_length: int) -> Prefix | None:
    """Read what the prompts have in common once, the adapter off.

    Args:
        model: whose LLM.
        prompts: R rows of token ids.
        max_length: tokens of the longest prompt and its continuation together.

    Returns:
        None where nothing is won (one prompt, or fewer than :data:`MIN_TOKENS` tokens in common) or where padding
        between the prefix and the rest of a prompt would change what the LLM computes: without position_ids, with
        recurrent layers, with a sliding window shorter than ``max_length``, or with rotary positions (longrope, dynamic
        NTK) that change between the two lengths.
    """
    tokens = common_prefix(prompts) if len(prompts) > 1 else ()
    if len(tokens) < MIN_TOKENS or not _takes_position_ids(model.causal_lm):
        return None
    key = length_key(model.causal_lm.base_model)
    if key is not None and key(len(tokens)) != key(max_length):
        return None
    with evaluation_mode(model), model.pretrained():
        ids = torch.tensor([tokens], device=model.device)
        cache = model(ids, is_generate=True, use_cache=True).past_key_values
    return Prefix(tokens, cache) if _keeps_all(cache, max_length) else None


def _takes_position_ids(llm: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(llm.forward).parameters


def _keeps_all(cache: Any, max_length: int) -> bool:
    """Whether every layer attends to all of ``max_length`` tokens, by keys and values alone."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    def keeps(layer: Any) -> bool:
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        return type(layer) is DynamicLayer or (window is not None and max_length < window)

    return type(cache) is DynamicCache and all(map(keeps, cache.layers))
