"""Predict the memory of a training step on one device, without loading weights.

The LLM is built on the meta device and run with fake tensors; the tensors that autograd would save for backward are
added up. So the count is right for every model family and adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ullme.models.attention import decoder_layers
from ullme.models.attention.packing import no_mask
from ullme.models.config import Quantization
from ullme.planning.flops import ModelCost
from ullme.utils.precision import autocast_is_needless

GIB = 2**30
# Bytes of a CUDA context with the workspaces of its libraries; of a process that has imported what training needs.
CONTEXT = {"cuda": 0.8 * GIB, "cpu": 0.4 * GIB}
# Memory that the allocator reserves but does not use, as a fraction of a step's. On a CPU measured for SmolLM2-135M in
# float32: 1.84 MB of resident memory a token, where 1.20 MB are counted.
FRAGMENTATION = {"cuda": 0.08, "cpu": 0.5}
# Bytes of a quantised weight. NF4: 4 bits, and the double-quantised scale of its block of 64 (arXiv 2305.14314);
# LLM.int8(): 8 bits, and a scale for each row (arXiv 2208.07339).
_QUANTISED_BYTES: dict[Quantization, float] = {"nf4": 0.516, "int8": 1.0}
_PROBE_TOKENS = 256
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm"}
_MOVE_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "_reshape_alias"}
_ATTENTION = "ullme_fused_shapes"


@dataclass(frozen=True)
class Activations:
    """Activation memory of one token.

    Args:
        saved: bytes that all layers save for backward, without gradient checkpointing.
        layers: number of decoder layers.
        boundary: bytes of a layer's input, all that is saved of a layer with gradient checkpointing.
        transient: bytes of the gradients that exist at the same time in backward.
        traffic: bytes that kernels other than matrix products and attention read and write in a forward.
    """

    saved: float
    layers: int
    boundary: float
    transient: float
    traffic: float = 0.0

    def peak(self, tokens: float, checkpointing: bool) -> float:
        """Peak bytes of a forward and backward over ``tokens`` tokens."""
        kept = self.layers * self.boundary + self.saved / self.layers if checkpointing else self.saved
        return tokens * (kept + self.transient)


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: its inputs, its output, and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("only the forward is run, to count saved tensors")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """An attention function for transformers that computes nothing and saves what a fused kernel saves."""
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


def activations(model: Any, compute: torch.dtype) -> Activations:
    """Count the activation memory of one token in a forward and backward.

    Args:
        model: the causal LM on the meta device, in PEFT's wrapper if there is an adapter; it cannot be used afterwards.
        compute: dtype of matrix products (by autocast, if the weights have another dtype).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal_lm.set_attn_implementation(_ATTENTION)
    decoder = causal_lm.base_model
    mode = FakeTensorMode()
    _use_fake_cpu_tensors(model, mode)
    model.train()

    def saved(tokens: int) -> tuple[int, int]:
        def run() -> Any:
            ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
            mask = no_mask(ids.device)
            return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)

        # As ULLME runs it: bfloat16 weights without autocast, which would leave float32 activations behind (powers).
        mixed = compute == torch.bfloat16 and not autocast_is_needless(causal_lm, compute)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
        with mode, autocast, _Traffic() as traffic:
            return _saved_bytes(run), traffic.bytes

    # both include the weights
    (once, moved), (twice, moved_twice) = saved(_PROBE_TOKENS), saved(2 * _PROBE_TOKENS)
    layers = decoder_layers(decoder)
    width = causal_lm.config.get_text_config().hidden_size
    widest = max(max(p.shape) for p in layers[0].parameters() if p.ndim == 2)
    return Activations(
        saved=(twice - once) / _PROBE_TOKENS,
        layers=len(layers),
        boundary=width * compute.itemsize,
        transient=2 * (widest + width) * compute.itemsize,
        traffic=(moved_twice - moved) / _PROBE_TOKENS,
    )


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that kernels read and write; matrix products are left out, and views, which move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func.overloadpacket.__name__ in _MOVE_NOTHING | _PRODUCTS):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def _use_fake_cpu_tensors(model: nn.Module, mode: Any) -> None:
    """Replace meta tensors by fake CPU tensors, for which autocast works as for real ones."""
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
    """Bytes of the distinct storages that autograd saves for backward in ``run()``, weights included."""
    sizes: dict[int, int] = {}
    alive = []  # keeps tensors alive, so that no address is used again

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
    """Predicted memory of a training step on one device, in bytes.

    Args:
        weights: of the LLM and the adapter; with FSDP, a shard and the layers that are gathered at the same time.
        training: gradients and AdamW's two moments of the trained weights.
        reference: the frozen copy of the LLM for π_ref, if there is one.
        activations: of the forward and backward of the largest chunk.
        head: one block of the LM head's logits, and their gradient.
        batch: representations and similarities of the whole batch.
        overhead: CUDA context and fragmentation.
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
        """The sum of all parts, in bytes."""
        return sum(vars(self).values())


def predict(
    cost: ModelCost,
    acts: Activations,
    *,
    weight_bytes: int,
    compute_bytes: int,
    shards: int,
    ddp_buckets: bool,
    frozen_copy: bool,
    checkpointing: bool,
    embed_tokens: float,
    generation_tokens: float,
    single_chunk: bool,
    head_logits: float,
    similarities: float,
    quantization: Quantization = "none",
    kind: str = "cuda",
) -> Memory:
    """Predict the memory of a training step on one device.

    Args:
        cost: numbers of parameters of the model.
        acts: its activation memory per token.
        weight_bytes: bytes of one of the LLM's weights.
        compute_bytes: bytes of one value in matrix products.
        shards: devices over which FSDP shards the LLM, its gradients and optimizer state; 1 without FSDP. Adapters are
            not sharded.
        ddp_buckets: DDP keeps gradients a second time, in its buckets.
        frozen_copy: π_ref is a second copy of the LLM.
        checkpointing: with gradient checkpointing.
        embed_tokens: tokens of the largest chunk's queries and passages.
        generation_tokens: tokens of the largest chunk's prompts and targets.
        single_chunk: the activations of both exist at the same time (no GradCache).
        head_logits: number of logits in one block of the LM head.
        similarities: number of float32 values in representations and similarities.
        quantization: how linear layers are stored; quantised ones are dequantised one at a time to ``compute_bytes``.
        kind: of device, ``cuda`` or ``cpu``.
    """
    base = cost.parameters - (0 if cost.full else cost.trainable)
    trained_bytes = weight_bytes if cost.full else 4  # PEFT keeps adapters in float32
    gathered = 2 * cost.linear / acts.layers * weight_bytes if shards > 1 else 0
    frozen = float(base * weight_bytes)
    if quantization != "none":
        frozen -= cost.linear * (weight_bytes - _QUANTISED_BYTES[quantization])
        gathered += cost.linear / acts.layers * compute_bytes
    # autocast saves a copy of the weights in its dtype for backward
    cast = cost.linear * compute_bytes if compute_bytes < weight_bytes else 0
    adapter = 0 if cost.full else cost.trainable * trained_bytes
    training = cost.trainable * trained_bytes * (4 if ddp_buckets else 3) / (shards if cost.full else 1)
    chunks = [acts.peak(tokens, checkpointing) for tokens in (embed_tokens, generation_tokens)]
    activations = sum(chunks) if single_chunk else max(chunks)
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
