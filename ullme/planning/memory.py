"""How much memory a training step takes on a device: counted from the model's own graph, without weights.

The LLM is built on the meta device and run as fake tensors, and what autograd would keep is added up. So every family,
and whatever an adapter keeps, is counted as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ullme.models.attention import decoder_layers
from ullme.models.attention.packing import no_mask
from ullme.planning.flops import ModelCost

GIB = 2**30
# A CUDA context with its libraries' workspaces; a process that has imported all that training needs.
CONTEXT = {"cuda": 0.8 * GIB, "cpu": 0.4 * GIB}
# What an allocator leaves unused, as a share of what is allocated for a step. CUDA's caches blocks; the C library's
# keeps what was freed between tensors that live on: SmolLM2-135M in float32 took 1.84 MB a token, counted 1.20 MB.
FRAGMENTATION = {"cuda": 0.08, "cpu": 0.5}
# A weight in NF4: half a byte, and float32 scales of blocks of 64 in a second quantization (arXiv 2305.14314).
_NF4_BYTES = 0.516
_PROBE_TOKENS = 256
_ATTENTION = "ullme_fused_shapes"


@dataclass(frozen=True)
class Activations:
    """What one token leaves behind for backward, in bytes.

    Args:
        saved: all layers, nothing recomputed.
        layers: decoder layers.
        boundary: a layer's input, which is all that checkpointing keeps of it.
        transient: the gradients that are alive at once in backward.
    """

    saved: float
    layers: int
    boundary: float
    transient: float

    def peak(self, tokens: float, checkpointing: bool) -> float:
        """Bytes at the height of a forward and backward over ``tokens`` tokens."""
        kept = self.layers * self.boundary + self.saved / self.layers if checkpointing else self.saved
        return tokens * (kept + self.transient)


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, its output, and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("shapes only")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


def activations(model: Any, compute: torch.dtype) -> Activations:
    """Count.

    Args:
        model: the causal LM on the meta device, with PEFT's wrapper where there is an adapter; it is used up.
        compute: the dtype of matrix products, by autocast where the weights have another.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal_lm.set_attn_implementation(_ATTENTION)
    decoder = causal_lm.base_model
    mode = FakeTensorMode()
    _pretend_on_cpu(model, mode)
    model.train()

    def saved(tokens: int) -> int:
        def run() -> Any:
            ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
            mask = no_mask(ids.device)
            return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)

        with mode, torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16 != model.dtype):
            return _saved_bytes(run)

    few, more = saved(_PROBE_TOKENS), saved(2 * _PROBE_TOKENS)  # weights are in both
    layers = decoder_layers(decoder)
    width = causal_lm.config.get_text_config().hidden_size
    widest = max(max(p.shape) for p in layers[0].parameters() if p.ndim == 2)
    return Activations(
        saved=(more - few) / _PROBE_TOKENS,
        layers=len(layers),
        boundary=width * compute.itemsize,
        transient=2 * (widest + width) * compute.itemsize,
    )


def _pretend_on_cpu(model: nn.Module, mode: Any) -> None:
    """Meta tensors become fake ones, which have a device type, so that autocast works as in a run."""
    from torch._subclasses.fake_tensor import FakeTensor

    def fake(x: Tensor) -> Tensor:
        return FakeTensor(mode, x.detach(), torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps while ``run`` runs, weights included."""
    sizes: dict[int, int] = {}
    alive = []  # so that no storage's place is taken by another

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        alive.append(x)
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(run())
    return sum(sizes.values())


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what takes them.

    Args:
        weights: the LLM's and the adapter's; with FSDP a shard, and the layers that are gathered at once.
        training: gradients and AdamW's two moments of what is trained.
        reference: a frozen copy of the LLM, where π_ref has one.
        activations: of the largest chunk, forward and backward.
        head: a block of the LM head's logits and what its gradient takes.
        batch: representations and similarities of the whole batch.
        overhead: CUDA context or the process itself, and fragmentation.
    """

    weights: float
    training: float
    reference: float
    activations: float
    head: float
    batch: float
    overhead: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def predict(
    cost: ModelCost,
    acts: Activations,
    *,
    weight_bytes: int,
    compute_bytes: int,
    shards: int,
    copies: bool,
    frozen_copy: bool,
    checkpointing: bool,
    embed_tokens: float,
    generation_tokens: float,
    together: bool,
    head_logits: float,
    similarities: float,
    quantized: bool = False,
    kind: str = "cuda",
) -> Memory:
    """Put together what a step takes.

    Args:
        cost: of the model.
        acts: of the model.
        weight_bytes: of one of the LLM's weights.
        compute_bytes: of one number in a matrix product.
        shards: devices that share the LLM's weights, and what trains them; 1 without FSDP. Adapters stay whole.
        copies: gradients are kept a second time, in DDP's buckets.
        frozen_copy: π_ref is a second LLM.
        checkpointing: the layers run again in backward.
        embed_tokens: of the largest chunk's queries and passages.
        generation_tokens: of its prompts and targets.
        together: both are alive at once (no GradCache).
        head_logits: logits at once.
        similarities: float32 numbers that representations and their similarities take.
        quantized: the LLM's linear layers hold NF4 numbers, and one at a time is put into ``compute_bytes``.
        kind: of device, ``cuda`` or ``cpu``.
    """
    base = cost.parameters - (0 if cost.full else cost.trainable)
    trained_bytes = weight_bytes if cost.full else 4  # PEFT keeps adapters in float32
    gathered = 2 * cost.linear / acts.layers * weight_bytes if shards > 1 else 0
    frozen = float(base * weight_bytes)
    if quantized:
        frozen -= cost.linear * (weight_bytes - _NF4_BYTES)
        gathered += cost.linear / acts.layers * compute_bytes
    # autocast keeps the weights once more in its own dtype, for backward
    cast = cost.linear * compute_bytes if compute_bytes < weight_bytes else 0
    adapter = 0 if cost.full else cost.trainable * trained_bytes
    training = cost.trainable * trained_bytes * (4 if copies else 3) / (shards if cost.full else 1)
    chunks = [acts.peak(tokens, checkpointing) for tokens in (embed_tokens, generation_tokens)]
    activations = sum(chunks) if together else max(chunks)
    head = head_logits * (2 * compute_bytes + 2 * 4)
    step = activations + head
    return Memory(
        weights=frozen / shards + adapter + gathered + cast,
        training=training,
        reference=frozen / shards if frozen_copy else 0,
        activations=activations,
        head=head,
        batch=similarities * 4,
        overhead=CONTEXT[kind] + FRAGMENTATION[kind] * step,
    )
