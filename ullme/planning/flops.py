"""How many floating-point operations a training step is: counted, not measured.

A multiplication and an addition are two operations. A linear layer of P weights costs 2 P a token forward, and as much
again for the gradient of its input, and once more for that of its weights where these are trained. Attention costs
4 · heads · head_dim a layer for every (query, key) pair that the mask lets through, and twice that backward. Norms,
activations and the optimizer are left out.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullme.batch import PARTS, Batch, LikelihoodKind
from ullme.losses.base import only_candidates

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ullme.engine.objective import Objective
    from ullme.models.config import BackboneConfig

Count = float | Tensor

# What config.layer_types calls layers with attention.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# How configs of mixtures of experts call their experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Work:
    """What a forward pass goes through. The fields are numbers or 0-dim tensors on the CPU.

    Args:
        tokens: real tokens through the decoder's layers.
        pairs: (query, key) pairs that attention may look at, summed over rows.
        targets: tokens through the LM head.
    """

    tokens: Count = 0
    pairs: Count = 0
    targets: Count = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.targets + other.targets)


@dataclass(frozen=True)
class StepWork:
    """One training step's forwards, each counted once.

    Args:
        embed: queries and passages, with gradient.
        learned: likelihoods that a term learns from.
        scored: likelihoods without gradient, statistics included.
        reference: likelihoods under π_ref.
        guide: queries and passages with the adapters off, without gradient, for masks of false negatives.
    """

    embed: Work = Work()
    learned: Work = Work()
    scored: Work = Work()
    reference: Work = Work()
    guide: Work = Work()

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class ModelCost:
    """What FLOPs follow from.

    Args:
        linear: weights that multiply every token, outside embeddings and LM head; of experts only the active share.
        adapter: weights of LoRA, counted likewise.
        head: weights of the LM head.
        attention_layers: layers with attention.
        attention_width: heads times head_dim.
        parameters: all weights, adapters included.
        trainable: those of them that are trained.
        full: whether the LLM's own weights are trained.
    """

    linear: float
    adapter: float
    head: int
    attention_layers: int
    attention_width: int
    parameters: int
    trainable: int
    full: bool

    def forward(self, work: Work, adapters: bool = True) -> Count:
        """FLOPs of a forward pass; ``adapters=False`` is the pre-trained LLM's."""
        weights = self.linear + (self.adapter if adapters else 0)
        return 2 * weights * work.tokens + self._attention(work) + 2 * self.head * work.targets

    def backward(self, work: Work) -> Count:
        """FLOPs of its gradient, nothing recomputed. Frozen weights take part once, trained ones twice."""
        passes = 2 if self.full else 1
        weights = passes * self.linear + 2 * self.adapter
        return 2 * weights * work.tokens + 2 * self._attention(work) + 2 * passes * self.head * work.targets

    def _attention(self, work: Work) -> Count:
        return 4 * self.attention_layers * self.attention_width * work.pairs

    def step(self, work: StepWork) -> Count:
        """Model FLOPs of a training step: what the gradient takes if nothing is done twice, the reference left out."""
        learned = work.embed, work.learned
        return sum(self.forward(w) + self.backward(w) for w in learned) + self.forward(work.scored)

    def hardware_step(self, work: StepWork, first_forward: bool, checkpointing: bool, reference: bool = True) -> Count:
        """FLOPs that the device runs.

        Args:
            first_forward: GradCache's forward without gradient happens (not where the batch fits one chunk).
            checkpointing: the layers run again in backward.
            reference: π_ref is computed, not read from a cache.
        """
        total = self.step(work) + self.forward(work.guide, adapters=False)
        if first_forward:
            total = total + self.forward(work.embed)
        if checkpointing:
            total = total + self.forward(work.embed) + self.forward(replace(work.learned, targets=0))
        return total + self.forward(work.reference, adapters=False) if reference else total


def model_cost(config: PretrainedConfig, options: BackboneConfig) -> ModelCost:
    """Count the weights of the LLM that ``config`` describes, with the adapter of ``options``.

    The model is built on the meta device: no memory, no weights read, and any family.

    Raises:
        ValueError: lora_target_modules match nothing.
    """
    return count_weights(meta_model(config, options), options)


def meta_model(config: PretrainedConfig, options: BackboneConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The LLM of ``config`` with its adapter, without memory."""
    from transformers import AutoModelForCausalLM

    from ullme.models.fused import fuse
    from ullme.models.loading import add_adapter

    config = deepcopy(config)  # a model built from it writes to it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    fuse(model)
    with torch.device("meta"):
        return add_adapter(model, options)


def count_weights(model: Any, options: BackboneConfig) -> ModelCost:
    """See :func:`model_cost`; ``model`` is the causal LM, with PEFT's wrapper where there is an adapter."""
    causal_lm = model if options.lora_name is None else model.get_base_model()
    text = causal_lm.config.get_text_config()
    head = causal_lm.get_output_embeddings()
    outside = {id(m.weight) for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)}
    outside |= {id(p) for p in head.parameters()}
    active = _active_experts(text)
    linear, adapter, total, trainable = 0.0, 0.0, 0, 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
        used = parameter.numel() * (active if ".experts." in name else 1)
        if ".lora_" in name:
            adapter += used
        elif parameter.ndim >= 2 and id(parameter) not in outside:
            linear += used
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelCost(
        linear=linear,
        adapter=adapter,
        head=getattr(head, "base_layer", head).weight.numel(),  # it may carry an adapter too
        attention_layers=sum(kind in _ATTENTION_LAYERS for kind in kinds),
        attention_width=text.num_attention_heads * head_dim,
        parameters=total,
        trainable=trainable,
        full=options.trained == "all",
    )


def _active_experts(config: Any) -> float:
    """The share of a mixture's experts that one token goes through."""
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), None)
    return getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0


def step_work(batch: Batch, objective: Objective, causal: bool, share_prompts: bool) -> StepWork:
    """What one step on ``batch`` goes through.

    Args:
        batch: of this rank.
        objective: says which candidates have which likelihoods computed (:meth:`Objective.scoring`); of a batch that
            names its terms, only these count.
        causal: the attention of embedding.
        share_prompts: a prompt really runs once for all of its targets (asked for, and the backbone is packed).
    """
    objective = objective.of_terms(batch.terms)
    embed = embedding_work(batch, causal) if objective.uses_reps else Work()
    total = StepWork(embed, guide=embed if objective.uses_guide else Work())
    if objective.masking is not None:
        total += StepWork(learned=masked_work(batch, objective.masking.share, causal))
    for kind, scored in objective.scoring(batch).items():
        total += StepWork(
            learned=generation_work(batch, scored.learned, share_prompts, kind),
            scored=generation_work(batch, scored.looked_at, share_prompts, kind)
            + generation_work(batch, scored.statistic, share_prompts, kind),
            reference=generation_work(batch, scored.reference, share_prompts, kind),
        )
    for term in objective.chunk_terms:
        if term.statistic_of_mismatched_pairs:
            # another query's positive behind each query: as long as the query's own, on average
            for kind in PARTS[term.direction]:
                once = generation_work(batch, only_candidates(batch, 1), share_prompts, kind)
                total += StepWork(scored=once, reference=once if term.uses_reference else Work())
    return total


def learned_work(batch: Batch, objective: Objective, share_prompts: bool) -> Work:
    """The likelihoods that some term learns from: what a chunk's forward with gradient goes through."""
    work = Work()
    for kind, scored in objective.scoring(batch).items():
        work += generation_work(batch, scored.learned, share_prompts, kind)
    return work


def embedding_work(batch: Batch, causal: bool) -> Work:
    """All rows that are embedded through the layers once."""
    lengths = batch.embedded_lengths
    return Work(lengths.sum(), _pairs(lengths, causal).sum())


def masked_work(batch: Batch, share: float, causal: bool) -> Work:
    """Queries through the layers once, and the masked share of their tokens through the LM head."""
    lengths = batch.queries.host_lengths
    return Work(lengths.sum(), _pairs(lengths, causal).sum(), lengths.sum() * share)


def generation_work(
    batch: Batch, mask: Tensor, share_prompts: bool, kind: LikelihoodKind = "passage_given_query"
) -> Work:
    """Likelihoods of the candidates in ``mask`` (b, C). A target's last token predicts nothing, so it needs no pass."""
    rows = batch.generation_rows(kind)
    prompts = rows.prompts.host_lengths.view(len(mask), -1)  # (b, 1) or (b, C)
    targets = rows.host_lengths(mask.shape)
    bodies = targets - 1
    if share_prompts and rows.shares_prompts:
        tokens = (prompts * mask.any(1, keepdim=True)).sum() + (bodies * mask).sum()
        own = (_pairs(prompts, True) * mask.any(1, keepdim=True)).sum()
        pairs = own + ((bodies * prompts + _pairs(bodies, True)) * mask).sum()
    else:
        lengths = (prompts + bodies) * mask
        tokens, pairs = lengths.sum(), _pairs(lengths, True).sum()
    return Work(tokens, pairs, (targets * mask).sum())


def _pairs(lengths: Tensor, causal: bool) -> Tensor:
    return lengths * (lengths + 1) // 2 if causal else lengths * lengths
