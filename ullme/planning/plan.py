"""``ullme plan``: memory and hours of a training run, before it, without weights, data or a device.

FLOPs come from :mod:`ullme.planning.flops` and memory from :mod:`ullme.planning.memory`; both build the LLM without
its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ullme.batch import Batch, GenerationRows, TokenRows
from ullme.engine.gradcache import chunk_slices
from ullme.models.likelihood import _BLOCK_LOGITS
from ullme.planning.devices import Device
from ullme.planning.flops import ModelCost, Work, count_weights, embedding_work, generation_work, meta_model, step_work
from ullme.planning.memory import FRAGMENTATION, GIB, Activations, Memory, activations, predict

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ullme.engine.objective import Objective
    from ullme.models.config import BackboneConfig

# The share of a device's memory that may be planned with; the rest is for what no model foresees, and a CPU's memory is
# shared with everybody.
USABLE = {"cuda": 0.92, "cpu": 0.5}
# Chunks that are tried where the configuration leaves the size open; smaller ones only where nothing else helps.
_CHUNKS = {"cuda": [2**n for n in range(16, 9, -1)], "cpu": [512, 256]}
_LEAST = {"cuda": 2**12, "cpu": 256}
# The share of the peak that is assumed where nothing is said; a CPU's peak is measured.
UTILISATION = {"cuda": 0.6, "cpu": 0.75}


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Args:
        options: the backbone's.
        config: the LLM's.
        objective: the loss.
        batch_size: queries in a global batch.
        candidates: C.
        rows: queries in an epoch.
        query_tokens: of an average query, template included.
        prompt_tokens: of an average query in the generation template.
        passage_tokens: of an average passage.
        query_max_length: in tokens.
        passage_max_length: in tokens.
        chunk_size: queries in a chunk, or None.
        chunk_tokens: tokens in a chunk; None for the largest that fits, if chunk_size is None too.
        full_batch: no chunks.
        frozen_copy: π_ref is a second LLM.
        half: products are computed in bfloat16.
    """

    options: BackboneConfig
    config: PretrainedConfig
    objective: Objective
    batch_size: int = 512
    candidates: int = 9
    rows: int = 279_040
    query_tokens: float = 30
    prompt_tokens: float = 33
    passage_tokens: float = 75
    query_max_length: int = 64
    passage_max_length: int = 256
    chunk_size: int | None = None
    chunk_tokens: int | None = None
    full_batch: bool = False
    frozen_copy: bool = False
    half: bool = True


@dataclass(frozen=True)
class Plan:
    """What is predicted.

    Args:
        job: of what; ``chunk_tokens`` is the choice where it was open.
        device: on what.
        count: how many of them.
        fsdp: whether they share the weights.
        weights: of the LLM and its adapter.
        trained: how many of them are trained.
        chunks: in a step.
        memory: on one device.
        held_tokens: tokens whose graphs find room beside a chunk, so that they are embedded only once.
        held_memory: bytes that these graphs take.
        step_flops: model FLOPs of a step on one device.
        hardware_flops: what the device runs for it: with what is computed twice, and π_ref.
        utilisation: assumed, of the device's peak by all that it runs.
    """

    job: Job
    device: Device
    count: int
    fsdp: bool
    weights: int
    trained: int
    chunks: int
    memory: Memory
    held_tokens: int
    held_memory: float
    step_flops: float
    hardware_flops: float
    utilisation: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def usable(self) -> float:
        """Bytes of the device that may be planned with."""
        return USABLE[self.device.kind] * self.device.memory_gib * GIB

    @property
    def seconds(self) -> float:
        """Of a step. What devices tell each other is not counted."""
        return self.hardware_flops / (self.device.tflops * 1e12 * self.utilisation)

    @property
    def steps(self) -> int:
        """Of an epoch; an incomplete last batch is left out."""
        return self.job.rows // self.job.batch_size

    @property
    def hours(self) -> float:
        """Of an epoch."""
        return self.steps * self.seconds / 3600

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, which ``Throughput`` logs: what is computed twice does not count."""
        return self.utilisation * self.step_flops / self.hardware_flops


def make_plan(job: Job, device: Device, count: int = 1, fsdp: bool = False, utilisation: float | None = None) -> Plan:
    """Predict.

    Args:
        job: what to train.
        device: on what.
        count: how many devices; the batch is spread over them.
        fsdp: they share the LLM's weights.
        utilisation: that is assumed, of the device's peak by all that it runs; None for what is usual (UTILISATION).

    Raises:
        ValueError: the batch does not divide by the devices, or a utilisation that cannot be.
    """
    if utilisation is None:
        utilisation = UTILISATION[device.kind]
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation={utilisation}: a share of the peak, above 0 and at most 1")
    if count < 1 or job.batch_size % count:
        raise ValueError(f"--num_devices={count}: data.batch_size={job.batch_size} must be a multiple of it")
    batch = typical_batch(job, job.batch_size // count)
    model = meta_model(job.config, job.options, _weight_dtype(job))
    cost = count_weights(model, job.options)
    acts = activations(model, compute_dtype(job))
    for choice in _choices(job, device.kind):
        plan = _plan(choice, batch, cost, acts, device, count, fsdp, utilisation, _is_open(job))
        if plan.fits:
            break
    return plan


def _is_open(job: Job) -> bool:
    """Whether the size of a chunk is left to ``auto``."""
    return job.chunk_tokens is None and job.chunk_size is None and not job.full_batch


def _choices(job: Job, kind: str) -> list[Job]:
    """What may be tried for what is left open, the fastest first. Without checkpointing, small chunks do not pay."""
    wanted = job.options.gradient_checkpointing
    choices = []
    for checkpointing in (False, True) if wanted == "auto" else (bool(wanted),):
        options = replace(job.options, gradient_checkpointing=checkpointing)
        least = _LEAST[kind] if wanted == "auto" and not checkpointing else 0
        sizes = [size for size in _CHUNKS[kind] if size >= least] if _is_open(job) else [job.chunk_tokens]
        choices += [replace(job, options=options, chunk_tokens=size) for size in sizes]
    return choices


def _plan(
    job: Job,
    batch: Batch,
    cost: ModelCost,
    acts: Activations,
    device: Device,
    count: int,
    fsdp: bool,
    utilisation: float,
    holds: bool,
) -> Plan:
    """With the chunks of ``job``, which are not open; ``holds``: what is left of memory may be filled with graphs."""
    weight_dtype, compute = _weight_dtype(job), compute_dtype(job)
    checkpointing = bool(job.options.gradient_checkpointing)
    causal = job.options.attention == "causal"
    work = step_work(batch, job.objective, causal, job.objective.share_prompts)
    whole = [slice(0, len(batch))]
    slices = whole if job.full_batch else chunk_slices(batch, job.chunk_size, job.chunk_tokens)
    chunks = [batch[s] for s in slices]
    generation = [_generation(chunk, job.objective) for chunk in chunks]
    vocabulary = cost.head // job.config.get_text_config().hidden_size
    block = max(64 * vocabulary, _BLOCK_LOGITS[device.kind])
    memory = predict(
        cost,
        acts,
        weight_bytes=weight_dtype.itemsize,
        compute_bytes=compute.itemsize,
        shards=count if fsdp else 1,
        copies=count > 1 and not fsdp,
        frozen_copy=job.frozen_copy and job.objective.uses_reference,
        checkpointing=checkpointing,
        embed_tokens=max(float(embedding_work(c, causal).tokens) for c in chunks) if job.objective.uses_reps else 0,
        generation_tokens=max(float(w.tokens) for w in generation),
        together=len(chunks) == 1,
        head_logits=min(block, max(float(w.targets) for w in generation) * vocabulary),
        similarities=_similarities(job, len(batch), count),
        quantized=job.options.quantization == "nf4",
        kind=device.kind,
    )
    left = USABLE[device.kind] * device.memory_gib * GIB - memory.total
    each = (1 + FRAGMENTATION[device.kind]) * acts.saved
    room = int(left / each) if holds and left > 0 and len(chunks) > 1 and not (checkpointing or fsdp) else 0
    held = min(room, batch.num_tokens)
    hardware = float(cost.hardware_step(work, False, checkpointing))
    if len(chunks) > 1 and job.objective.uses_reps:
        hardware += float(cost.forward(work.embed)) * (1 - held / batch.num_tokens)
    return Plan(
        job=job,
        device=device,
        count=count,
        fsdp=fsdp,
        weights=cost.parameters,
        trained=cost.trainable,
        chunks=len(chunks),
        memory=memory,
        held_tokens=held,
        held_memory=held * each,
        step_flops=float(cost.step(work)),
        hardware_flops=hardware,
        utilisation=utilisation,
    )


def compute_dtype(job: Job) -> torch.dtype:
    """Of matrix products."""
    return torch.bfloat16 if job.half else _weight_dtype(job)


def _weight_dtype(job: Job) -> torch.dtype:
    if job.options.dtype != "auto":
        return getattr(torch, job.options.dtype)
    stored = getattr(job.config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _generation(chunk: Batch, objective: Objective) -> Work:
    if not objective.chunk_terms:
        return Work()
    learned = torch.stack([term.candidates(chunk)[1] for term in objective.chunk_terms]).any(0)
    return generation_work(chunk, learned, objective.share_prompts)


def _similarities(job: Job, queries: int, count: int) -> float:
    """Numbers in representations, their gradients, and the similarities of own queries with all passages."""
    passages = job.batch_size * job.candidates
    width = job.config.get_text_config().hidden_size
    return 3 * queries * (1 + job.candidates) * width + passages * width * (count > 1) + 3 * queries * passages


def typical_batch(job: Job, queries: int) -> Batch:
    """Rows of lengths like the job's: passages are lognormal around their mean with sigma 0.4, as MS MARCO's are."""
    rng = np.random.default_rng(0)
    spread = rng.lognormal(-(0.4**2) / 2, 0.4, queries * job.candidates)
    passages = _whole(job.passage_tokens * spread, job.passage_max_length)
    own = _whole(np.full(queries, job.query_tokens), job.query_max_length)
    prompts = _whole(np.full(queries, job.prompt_tokens), 2**31)
    return Batch(
        _rows(own),
        _rows(passages),
        torch.arange(queries * job.candidates).view(queries, -1),
        torch.arange(queries),
        GenerationRows(_rows(prompts), _rows((passages + 1).clamp(max=job.passage_max_length))),
    )


def _whole(lengths: np.ndarray, most: int) -> Tensor:
    return torch.from_numpy(np.clip(np.rint(lengths), 1, most).astype(np.int64))


def _rows(lengths: Tensor) -> TokenRows:
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return TokenRows(mask, mask)
