"""log π(passage | query) under causal attention (arXiv 2408.03402, section 3.3), without ever holding (B, L, V) logits.

Prompt and passage are tokenised apart, so exactly the passage's tokens are scored. The LM head runs on the hidden
states in front of them only, in blocks that are recomputed in backward, and leaves one float32 number a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ullme.batch import HostMasks, TokenRows
from ullme.models import attention
from ullme.models.attention.layers import rounding, token_table
from ullme.models.attention.packed_rows import PackedRows, real_lengths
from ullme.models.pooling import sum_rows
from ullme.utils.modes import evaluation_mode
from ullme.utils.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of one block of the LM head: 64 MiB in float32 on a CPU; a GPU wants taller matrices.
_BLOCK_LOGITS = {"cpu": 2**24, "cuda": 2**27}


@dataclass(frozen=True)
class Likelihood:
    """How likely each passage is.

    Args:
        logps: (R,) log-likelihood of the whole passage, in nats, float32.
        lengths: (R,) tokens it is the sum over.
    """

    logps: Tensor
    lengths: Tensor


def likelihood(
    model: PreTrainedModel,
    packed: bool,
    prompts: TokenRows,
    targets: TokenRows,
    owner: np.ndarray,
    share_prompts: bool,
) -> Likelihood:
    """Log-likelihood of R passages, each after its own prompt.

    Args:
        model: the causal LM, adapters inside.
        packed: whether its attention takes packed rows.
        prompts: B token rows.
        targets: R token rows.
        owner: (R,) index of each target's prompt, not falling.
        share_prompts: run a prompt once for all of its targets; packed only.
    """
    texts = _Texts.of(prompts, targets, owner)
    key = attention.length_key(attention.text_decoder(model.base_model))
    if share_prompts and key is not None:
        # A prompt is run once only for passages that give it the same rotary positions.
        keys = [key(int(length)) for length in texts.prompt_lengths + texts.target_lengths - 1]
        share_prompts = len(set(zip(owner.tolist(), keys, strict=True))) == len(set(owner.tolist()))
    ids = torch.cat([prompts.input_ids.flatten(), targets.input_ids.flatten()])
    if packed:
        hidden, labels, lengths = _packed_hidden(model, ids, texts, share_prompts)
    else:
        hidden, labels, lengths = _padded_hidden(model, ids, texts)
    return Likelihood(sum_rows(token_log_probabilities(model, hidden, labels), lengths), lengths)


@dataclass(frozen=True)
class _Texts:
    """Where the tokens of R prompts and their targets are among all token ids: (prompts, then targets), flattened.

    Args:
        places: of every real token, all prompts' and then all targets'.
        prompt_starts: (R,) where each target's prompt begins among ``places``.
        prompt_lengths: (R,) its tokens.
        target_starts: (R,) where the target begins among ``places``.
        target_lengths: (R,) its tokens.
        new_prompt: (R,) bool, whether the prompt is another one than that of the target before.
    """

    places: np.ndarray
    prompt_starts: np.ndarray
    prompt_lengths: np.ndarray
    target_starts: np.ndarray
    target_lengths: np.ndarray
    new_prompt: np.ndarray

    @classmethod
    def of(cls, prompts: TokenRows, targets: TokenRows, owner: np.ndarray) -> _Texts:
        masks = prompts.host_masks, targets.host_masks
        prompt_lengths, target_lengths = (real_lengths(mask) for mask in masks)
        real = [np.flatnonzero(mask.attention) for mask in masks]
        starts = np.cumsum(prompt_lengths) - prompt_lengths
        target_starts = np.cumsum(target_lengths) - target_lengths + len(real[0])
        places = np.concatenate([real[0], real[1] + masks[0].attention.size])
        new_prompt = np.append(True, owner[1:] != owner[:-1])
        return cls(places, starts[owner], prompt_lengths[owner], target_starts, target_lengths, new_prompt)

    @property
    def labels(self) -> np.ndarray:
        """(Σ target tokens,) where the tokens that are scored are among all token ids."""
        return self.places[self.target_starts[0] :]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of every range, one range after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


def _alternate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(2 R,) an element of the one and of the other in turn."""
    return np.stack([first, second], axis=1).ravel()


def masked_likelihood(model: PreTrainedModel, hidden: Tensor, attention_mask: Tensor, masked: Tensor) -> Likelihood:
    """Log-likelihood of masked tokens, each read off the position before it (MNTP, arXiv 2404.05961, section 2.2).

    Args:
        model: the causal LM whose head is used.
        hidden: (T, D) hidden states of the real tokens, row after row.
        attention_mask: (R, L), 1 on the T real tokens.
        masked: (R, L) the masked tokens, -100 elsewhere; never a row's first.

    Returns:
        Of the R rows, the sum over a row's masked tokens and their number, which may be 0.
    """
    tokens = masked[attention_mask.bool()]
    places = (tokens != -100).nonzero()[:, 0]
    counts = (masked != -100).sum(1)
    token_logps = token_log_probabilities(model, hidden[places - 1], tokens[places])
    row = torch.arange(len(masked), device=counts.device).repeat_interleave(counts, output_size=len(places))
    return Likelihood(token_logps.new_zeros(len(masked)).index_add(0, row, token_logps), counts)


def _packed_hidden(model: PreTrainedModel, ids: Tensor, texts: _Texts, share: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states in front of every target token (Σ target tokens, D), those tokens, and the R targets' lengths.

    A target's last token needs no forward.

    Args:
        model: the causal LM.
        ids: all token ids.
        texts: where each text is among them.
        share: run a prompt once for all of its targets.
    """
    bodies = texts.target_lengths - 1
    starts = _alternate(texts.prompt_starts, texts.target_starts)
    lengths = _alternate(np.where(texts.new_prompt | (not share), texts.prompt_lengths, 0), bodies)
    parents = None
    ends = np.cumsum(lengths)
    if share:
        # Prompts and bodies are rows of their own; a body continues the last prompt before it.
        row = np.cumsum(lengths > 0) - 1
        last = np.maximum.accumulate(np.where(texts.new_prompt, np.arange(len(bodies)), 0))
        prompt_end = ends[0::2][last] - 1
        parents = _alternate(np.full_like(bodies, -1), row[0::2][last])[lengths > 0]
        first, length = _alternate(prompt_end, ends[0::2]), _alternate(np.ones_like(bodies), bodies)
        row_lengths = lengths[lengths > 0]
    else:
        first, length = ends[0::2] - 1, texts.target_lengths
        row_lengths = lengths.reshape(-1, 2).sum(1)
    indices = {
        "tokens": texts.places[_ranges(starts, lengths)],
        "predictors": _ranges(first, length),
        "labels": texts.labels,
        "target_lengths": texts.target_lengths,
    }
    rows = PackedRows(row_lengths, ids.device, parents, indices)
    hidden = attention.run_rows(model.base_model, ids[rows.indices["tokens"]], rows, causal=True)
    return hidden[rows.indices["predictors"]], ids[rows.indices["labels"]], rows.indices["target_lengths"]


def _padded_hidden(model: PreTrainedModel, ids: Tensor, texts: _Texts) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_packed_hidden`, in a padded block, for backbones that cannot be packed."""
    lengths = texts.prompt_lengths + texts.target_lengths - 1
    parts = _alternate(texts.prompt_lengths, texts.target_lengths - 1)
    block = np.arange(lengths.max()) < lengths[:, None]
    tokens = texts.places[_ranges(_alternate(texts.prompt_starts, texts.target_starts), parts)]
    predictors = _ranges(np.cumsum(lengths) - texts.target_lengths, texts.target_lengths)
    arrays = [tokens, np.flatnonzero(block), block, predictors, texts.labels, texts.target_lengths]
    source, target, mask, before, labels, target_lengths = to_device(arrays, ids.device)
    padded = ids.new_zeros(block.size).index_copy(0, target, ids[source]).view(block.shape)
    hidden = attention.run_padded(model.base_model, padded, mask.long(), True, HostMasks(block)).flat
    return hidden[before], ids[labels], target_lengths


def token_log_probabilities(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, in blocks of the LM head.

    Args:
        model: the causal LM whose head is used.
        hidden: (T, D) hidden states in front of the targets.
        targets: (T,) token ids.

    Returns:
        (T,) in nats, float32 (float64 for float64 hidden states).
    """
    head = model.get_output_embeddings()
    size = max(64, _BLOCK_LOGITS.get(hidden.device.type, 2**24) // head.weight.shape[0])
    blocks = list(zip(hidden.split(size), targets.split(size), strict=True))

    def block(states: Tensor, ids: Tensor) -> Tensor:
        logits = lm_logits(model, states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -nn.functional.cross_entropy(logits, ids, reduction="none")  # fused, unlike gather and logsumexp

    if not torch.is_grad_enabled() or not (hidden.requires_grad or _is_trained(head)):
        return torch.cat([block(h, t) for h, t in blocks])
    if type(head) is nn.Linear and not _is_trained(head) and not _changes_logits(model):
        return torch.cat([_frozen_head(h, head, t) for h, t in blocks])
    return torch.cat(
        [  # an adapter on the head may have dropout
            checkpoint(block, h, t, use_reentrant=False, preserve_rng_state=model.training) for h, t in blocks
        ]
    )


def _is_trained(head: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in head.parameters())


def _frozen_head(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """(T,) log-probabilities of one block, for a linear head without gradient."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return _FrozenHead.apply(hidden.to(dtype), head.weight.to(dtype), bias, targets)


class _FrozenHead(torch.autograd.Function):
    """log softmax(W h + b)_y and, while the logits are there, its gradient W_y - Σ_v p_v W_v with respect to h.

    So backward needs neither the logits nor to compute them a second time.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, weight, bias)
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found = logps.gather(1, targets[:, None])[:, 0].clone()
        slope = logps.exp_().neg_()  # 1 - p is formed before it is rounded: a likely token's slope is small
        slope.scatter_add_(1, targets[:, None], torch.ones_like(slope[:, :1]))
        ctx.save_for_backward(slope.to(weight.dtype) @ weight)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def _changes_logits(model: PreTrainedModel) -> bool:
    """Whether :func:`lm_logits` does more than the head's product."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"))


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(T, V) logits of hidden states (T, D), with what a family does around its head."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = cap * torch.tanh(logits / cap)
    return logits


def check_stored_head(model: PreTrainedModel) -> None:
    """Raises: ValueError: the LM head was not among the stored weights, so it is random, and so are likelihoods."""
    missing: frozenset[str] = getattr(model, "weights_not_stored", frozenset())
    head = model.get_output_embeddings().weight
    if any(value is head and name in missing for name, value in model.named_parameters(remove_duplicate=False)):
        raise ValueError(
            f"model_name_or_path={model.config._name_or_path!r} stores no language-model head, so that it can "
            "embed and not generate; take the LLM itself, not an embedding model made of it"
        )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare :func:`lm_logits` with the model's own forward on a few tokens.

    Raises:
        ValueError: the family does something else around its LM head, so likelihoods would be wrong; or there is no
            trained head.
    """
    check_stored_head(model)
    table = token_table(model)
    device = table.device
    ids = torch.arange(5, 11, device=device)[None] % len(table)
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        expected = model(input_ids=ids).logits[0].double()
        states = attention.text_decoder(model.base_model)(input_ids=ids).last_hidden_state[0]
        found = lm_logits(model, states).double()
    tolerance = rounding(model.dtype) * max(1.0, expected.abs().max().item())
    if not (expected - found).abs().max() <= tolerance:
        raise ValueError(
            f"the {model.config.model_type!r} backbone changes its logits in a way that is not known here, so "
            "likelihoods would be wrong; train without generation terms, or take another backbone"
        )
