"""log π(passage | query) under causal attention (arXiv 2408.03402, section 3.3), without ever holding (B, L, V) logits.

Prompt and passage are tokenised apart, so exactly the passage's tokens are scored. The LM head runs on the hidden
states in front of them only, in blocks that are recomputed in backward, and leaves one float32 number a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ullme.batch import TokenRows
from ullme.models import attention
from ullme.models.attention.layers import rounding, token_table
from ullme.models.attention.packed_rows import PackedRows, real_lengths

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
    owner: Tensor,
    share_prompts: bool,
) -> Likelihood:
    """Log-likelihood of R passages, each after its own prompt.

    Args:
        model: the causal LM, adapters inside.
        packed: whether its attention takes packed rows.
        prompts: B token rows, right-padded.
        targets: R token rows, right-padded.
        owner: (R,) index of each target's prompt, not falling.
        share_prompts: run a prompt once for all of its targets; packed only.
    """
    owners = owner.tolist()
    prompt_rows, target_rows = _unpad(prompts), _unpad(targets)
    key = attention.length_key(attention.text_decoder(model.base_model))
    if share_prompts and key is not None:
        # A prompt is run once only for passages that give it the same rotary positions.
        keys = [key(len(prompt_rows[o]) + len(row) - 1) for o, row in zip(owners, target_rows, strict=True)]
        share_prompts = len(set(zip(owners, keys, strict=True))) == len(set(owners))
    if packed:
        hidden = _packed_hidden(model, prompt_rows, target_rows, owners, share_prompts)
    else:
        hidden = _padded_hidden(model, prompt_rows, target_rows, owners)
    token_logps = token_log_probabilities(model, hidden, torch.cat(target_rows))
    lengths = torch.tensor([len(row) for row in target_rows], device=hidden.device)
    return Likelihood(torch.segment_reduce(token_logps, "sum", lengths=lengths), lengths)


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


def _unpad(rows: TokenRows) -> list[Tensor]:
    lengths = real_lengths(rows.attention_mask)
    return list(rows.input_ids[rows.attention_mask.bool()].split(lengths))


def _packed_hidden(
    model: PreTrainedModel, prompts: list[Tensor], targets: list[Tensor], owners: list[int], share: bool
) -> Tensor:
    """(Σ target tokens, D) hidden states in front of every target token. A target's last token needs no forward."""
    pieces: list[Tensor] = []
    lengths: list[int] = []
    parents: list[int] = []
    predictors: list[Tensor] = []
    total, prompt_row, prompt_end, last_owner = 0, -1, -1, -1
    for owner, target in zip(owners, targets, strict=True):
        prompt, body = prompts[owner], target[:-1]
        if not share:
            pieces += [prompt, body]
            lengths.append(len(prompt) + len(body))
            parents.append(-1)
            predictors.append(torch.arange(total + len(prompt) - 1, total + lengths[-1]))
            total += lengths[-1]
            continue
        if owner != last_owner:
            pieces.append(prompt)
            prompt_row, last_owner = len(lengths), owner
            lengths.append(len(prompt))
            parents.append(-1)
            total += len(prompt)
            prompt_end = total - 1
        predictors.append(torch.tensor([prompt_end]))
        if len(body):
            pieces.append(body)
            lengths.append(len(body))
            parents.append(prompt_row)
            predictors.append(torch.arange(total, total + len(body)))
            total += len(body)
    tokens = torch.cat(pieces)
    rows = PackedRows(lengths, tokens.device, parents if share else None)
    hidden = attention.run_rows(model.base_model, tokens, rows, causal=True)
    return hidden[torch.cat(predictors).to(hidden.device)]


def _padded_hidden(model: PreTrainedModel, prompts: list[Tensor], targets: list[Tensor], owners: list[int]) -> Tensor:
    """As :func:`_packed_hidden`, in a padded block, for backbones that cannot be packed."""
    rows = [torch.cat([prompts[owner], target[:-1]]) for owner, target in zip(owners, targets, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    hidden = attention.run_padded(model.base_model, ids, mask, causal=True).flat
    starts = (lengths.cumsum(0) - lengths).tolist()
    firsts = [start + len(prompts[owner]) - 1 for start, owner in zip(starts, owners, strict=True)]
    wanted = [torch.arange(first, first + len(target)) for first, target in zip(firsts, targets, strict=True)]
    return hidden[torch.cat(wanted).to(hidden.device)]


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


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare :func:`lm_logits` with the model's own forward on a few tokens.

    Raises:
        ValueError: the family does something else around its LM head, so likelihoods would be wrong.
    """
    training = model.training
    table = token_table(model)
    device = table.device
    ids = torch.arange(5, 11, device=device)[None] % len(table)
    try:
        model.eval()
        with torch.autocast(device.type, enabled=False):
            expected = model(input_ids=ids).logits[0].double()
            found = lm_logits(
                model, attention.text_decoder(model.base_model)(input_ids=ids).last_hidden_state[0]
            ).double()
    finally:
        model.train(training)
    tolerance = rounding(model.dtype) * max(1.0, expected.abs().max().item())
    if not (expected - found).abs().max() <= tolerance:
        raise ValueError(
            f"the {model.config.model_type!r} backbone changes its logits in a way that is not known here, so "
            "likelihoods would be wrong; train without generation terms, or take another backbone"
        )
