"""Merging the trained weights into the LLM, and measuring what merging and the dtype change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ullme.commands.export.contract import PROMPT_NAMES
from ullme.models.attention import packing
from ullme.models.attention.layers import token_table
from ullme.models.attention.paths import text_decoder
from ullme.models.pooling import pool_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullme.models.ullme import ULLME

# Largest difference between components of two unit vectors that count as the same, computed in float32.
SAME = 1e-5
# Families for which text-embeddings-inference reads use_bidirectional_attention instead of is_causal.
_TEI_KEY = ("llama", "mistral", "qwen3")


def working_dtype(model: ULLME) -> torch.dtype:
    """The dtype of the comparisons: float32, or float64 for a float64 model."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def embeddings(model: ULLME, texts: Sequence[str], max_length: int) -> Tensor:
    """(2 R, D): the R texts as queries, then as passages."""
    parts = [model.encode(texts, role=role, max_length=max_length, convert_to_tensor=True) for role in PROMPT_NAMES]
    return torch.cat([torch.as_tensor(part) for part in parts])


def merge(model: ULLME) -> None:
    """Merge the adapter into the LLM, in place, in the weights' own dtype. Without an adapter nothing changes.

    Raises:
        ValueError: the merged weights are not finite.
    """
    if model.options.lora_name is None:
        return
    from ullme.models import lora  # imports PEFT

    try:
        model.llm = lora.merge(model.llm, safe=True)
    except ValueError as error:
        raise ValueError(f"the adapter cannot be merged: {error}") from error
    model.options = replace(model.options, lora_name=None, train=None)


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every weight to what ``dtype`` can hold, in place; the weights keep their type.

    Raises:
        ValueError: a weight is too large for it.
    """
    for name, weight in model.named_parameters():
        weight.copy_(weight.to(dtype))
        if not weight.isfinite().all():
            short = str(dtype).removeprefix("torch.")
            raise ValueError(f"--dtype {short} cannot hold the weights: {name} overflows; export with --dtype float32")


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of a component; infinite where one of the two is not finite."""
    worst = (a.double() - b.double()).abs().max().item()
    return math.inf if math.isnan(worst) else worst


def angle(a: Tensor, b: Tensor) -> float:
    """Largest 1 - cosine between rows of unit length; infinite where one of the two is not finite."""
    worst = ((a.double() - b.double()) ** 2).sum(dim=-1).max().item() / 2
    return math.inf if math.isnan(worst) else worst


def check_merged(before: Tensor, after: Tensor) -> float:
    """The difference that merging makes, before rounding. Raises: ValueError: it is more than :data:`SAME`."""
    if not (found := difference(before, after)) <= SAME:
        raise ValueError(
            f"the merged model gives other embeddings than the adapter does (a component differs by {found:.1e}, "
            f"allowed are {SAME:.0e}); export the adapter itself with --adapter_only"
        )
    return found


def check_rounded(before: Tensor, after: Tensor, dtype: str, tolerance: float) -> float:
    """The 1 - cosine that rounding to the dtype costs. Raises: ValueError: it is more than ``tolerance``."""
    if not (found := angle(before, after)) <= tolerance:
        raise ValueError(
            f"--dtype {dtype} changes the embeddings: 1 - cosine is up to {found:.1e} between the merged weights as "
            f"they are and as {dtype} rounds them, allowed are {tolerance:.0e} (--tolerance); export with "
            "--dtype float32, or allow more"
        )
    return found


def prepare_decoder(model: ULLME) -> PreTrainedModel:
    """The decoder without its head, configured so that transformers alone runs it with the model's attention.

    transformers (5.2 and newer) reads ``is_causal: false`` from config.json.

    Raises:
        ValueError: the family ignores it.
    """
    causal_lm = model.causal_lm
    block = _block(model)
    with torch.no_grad():
        expected = model(*block)["rep"]
    packing.uninstall(causal_lm)
    decoder: PreTrainedModel = text_decoder(causal_lm.base_model)  # type: ignore[assignment]
    bidirectional = model.options.attention == "bidirectional"
    for config in {id(c): c for c in (decoder.config, decoder.config.get_text_config())}.values():
        if bidirectional:
            config.is_causal = False
        elif "is_causal" in vars(config):
            del config.is_causal
        if bidirectional and config.model_type in _TEI_KEY:
            config.use_bidirectional_attention = True
    pooling: Any = model.options.pooling
    try:
        found = plain_forward(decoder, *block, pooling)
        # In some families a batch without padding gets no mask, and is then causal.
        alone = plain_forward(decoder, block[0][:1], block[1][:1], pooling)
    except Exception as error:  # the family may not support any other path than the one that the probe chose
        raise ValueError(unsupported(model, short(error))) from error
    worst = max(difference(expected, found), difference(expected[:1], alone))
    if not worst <= SAME:
        raise ValueError(unsupported(model, f"a component differs by {worst:.1e}"))
    return decoder


def short(error: Exception) -> str:
    """The type of an error and the beginning of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


def unsupported(model: ULLME, reason: str) -> str:
    """The message for a model whose attention transformers alone cannot reproduce."""
    family = model.causal_lm.config.model_type
    kind = model.options.attention
    return (
        f"{family!r} with {kind} attention (path {model.attention_path}) does not embed the same when transformers "
        f"loads it without ullme ({reason}): "
        + (
            "the family ignores is_causal: false in its config.json. Train with attention: causal or on another "
            "family (llama, mistral, qwen, gemma, phi ...), or export with --adapter_only and embed with ullme"
            if kind == "bidirectional"
            else "export with --adapter_only and embed with ullme"
        )
    )


def _block(model: ULLME) -> tuple[Tensor, Tensor]:
    """(2, 12) token ids of two rows, 12 and 7 tokens long, and their mask."""
    rows = len(token_table(model.causal_lm))
    ids = (torch.arange(24, device=model.device).view(2, 12) * 7 + 11) % rows
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


@torch.no_grad()
def plain_forward(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(R, D) of a padded block as transformers runs it, pooled and normalised."""
    hidden = decoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return nn.functional.normalize(pool_padded(hidden, attention_mask, pooling), dim=-1)
