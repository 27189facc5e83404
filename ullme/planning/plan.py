"""Predict memory and duration of a training run, without weights, data or a device (``ullme plan``).

FLOPs come from :mod:`ullme.planning.flops`, memory from :mod:`ullme.planning.memory`; both build the LLM without
its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ullme.batch import Batch, GenerationRows
from ullme.engine.gradcache import chunk_slices
from ullme.models.likelihood import _BLOCK_LOGITS
from ullme.planning.devices import Device
from ullme.planning.flops import ModelCost, count_weights, embedding_work, learned_work, meta_model, step_work
from ullme.planning.memory import FRAGMENTATION, GIB, Activations, Memory, activations, predict
from ullme.token_rows import TokenRows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ullme.engine.objective import Objective
    from ullme.models.config import BackboneConfig

# Fraction of a device's memory that a plan may use; the rest is a margin for what is not predicted, and on a CPU for
# other processes.
USABLE = {"cuda": 0.92, "cpu": 0.5}
# Assumed fraction of the peak of a device whose memory bandwidth is not known; a CPU's peak is measured.
UTILISATION = {"cuda": 0.6, "cpu": 0.75}
# Assumed fractions of the vendor's peaks: of large matrix products, and of the memory's bandwidth in other kernels.
PRODUCTS, BANDWIDTH = 0.75, 0.8
# Bytes that a backward moves, over a forward's: where a forward's kernel reads one tensor and writes one, a backward's
# reads a gradient and what was saved, and writes a gradient.
_BACKWARD_TRAFFIC = 1.5
# Bytes that the LM head's softmax moves for each logit: written and read in half precision, three times in float32.
_BYTES_PER_LOGIT = 16
# Chunk sizes in tokens that are tried with chunk_tokens: auto, and the smallest one before gradient checkpointing is.
_CHUNK_TOKENS = {"cuda": [2**n for n in range(16, 9, -1)], "cpu": [512, 256]}
_MIN_TOKENS_BEFORE_CHECKPOINTING = {"cuda": 2**13, "cpu": 256}


@dataclass(frozen=True)
class Job:
    """A training run to plan.

    Args:
        options: of the backbone.
        config: of the LLM.
        objective: the loss terms.
        batch_size: queries in a global batch.
        candidates: C, passages per query.
        extra_positives: K, more positives per query, which are embedded and not generated.
        rows: queries in an epoch.
        query_tokens: tokens of an average query, template included.
        prompt_tokens: tokens of an average query in the generation template.
        passage_tokens: tokens of an average passage.
        bare_query_tokens: tokens of an average query without a template, as scored in log π(query | passage).
        query_template_tokens: tokens of the template around the passage there.
        query_max_length: in tokens.
        passage_max_length: in tokens.
        chunk_size: queries in a chunk, or None.
        chunk_tokens: tokens in a chunk; None for the largest that fits, if chunk_size is None too.
        full_batch: no chunks.
        frozen_copy: π_ref is a second copy of the LLM.
        half: matrix products are computed in bfloat16.
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
    bare_query_tokens: float = 8
    query_template_tokens: float = 12
    extra_positives: int = 0


@dataclass(frozen=True)
class Plan:
    """The predicted memory and duration of a training run.

    Args:
        job: the run, with the ``chunk_tokens`` and gradient checkpointing that were chosen.
        device: the accelerator.
        num_devices: how many of them.
        fsdp: whether FSDP shards the LLM over them.
        weights: number of weights of the LLM and its adapter.
        trained: number of weights that are trained.
        chunks: number of chunks in a step.
        memory: on one device.
        retained_tokens: tokens whose graphs fit beside a chunk, so that they are embedded only once.
        retained_memory: bytes of these graphs.
        step_flops: model FLOPs of a step on one device.
        hardware_flops: FLOPs that the device computes in a step, including recomputation and π_ref.
        traffic: bytes that other kernels than matrix products read and write in a step.
        reference_flops: the part of hardware_flops that π_ref takes, which a filled ``loss.cache_reference`` saves.
        reference_traffic: the same part of the traffic.
        assumed: hardware FLOPs per second as a fraction of the device's peak, where that is given; None predicts the
            time from its parts.
    """

    job: Job
    device: Device
    num_devices: int
    fsdp: bool
    weights: int
    trained: int
    chunks: int
    memory: Memory
    retained_tokens: int
    retained_memory: float
    step_flops: float
    hardware_flops: float
    traffic: float
    reference_flops: float
    reference_traffic: float
    assumed: float | None

    @property
    def fits(self) -> bool:
        """Whether the predicted memory fits, with a margin."""
        return self.memory.total <= self.usable_memory

    @property
    def usable_memory(self) -> float:
        """Bytes of a device that the plan may use."""
        return USABLE[self.device.kind] * self.device.memory_gib * GIB

    @property
    def seconds(self) -> float:
        """Duration of a step; communication between devices is not counted."""
        return sum(self.parts.values())

    @property
    def seconds_with_cache(self) -> float:
        """Duration of a step whose likelihoods under π_ref are all in ``loss.cache_reference``."""
        flops, traffic = self.hardware_flops - self.reference_flops, self.traffic - self.reference_traffic
        return replace(self, hardware_flops=flops, traffic=traffic).seconds

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of a step by what limits them; a single part where a fraction of the peak is assumed."""
        peak = self.device.tflops * 1e12
        if self.assumed is not None or self.device.bandwidth is None:
            return {"everything": self.hardware_flops / (peak * (self.assumed or UTILISATION[self.device.kind]))}
        return {
            "matrix products": self.hardware_flops / (peak * PRODUCTS),
            "other kernels (memory bandwidth)": self.traffic / (self.device.bandwidth * 1e9 * BANDWIDTH),
        }

    @property
    def utilisation(self) -> float:
        """Hardware FLOPs per second, as a fraction of the device's peak."""
        return self.hardware_flops / (self.device.tflops * 1e12 * self.seconds)

    @property
    def steps(self) -> int:
        """Steps in an epoch, without an incomplete last batch."""
        return self.job.rows // self.job.batch_size

    @property
    def hours(self) -> float:
        """Duration of an epoch."""
        return self.steps * self.seconds / 3600

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, as ``Throughput`` logs it: without recomputation and π_ref."""
        return self.utilisation * self.step_flops / self.hardware_flops


def make_plan(
    job: Job, device: Device, num_devices: int = 1, fsdp: bool = False, utilisation: float | None = None
) -> Plan:
    """Predict memory and duration of a training run, and choose what it leaves to ``auto``.

    Args:
        job: the training run.
        device: the device.
        num_devices: how many of them; the batch is split over them.
        fsdp: whether FSDP shards the LLM over them.
        utilisation: assumed hardware FLOPs per second, as a fraction of the device's peak; None predicts the time from
            matrix products and memory traffic, or takes ``UTILISATION`` where the bandwidth is not known.

    Raises:
        ValueError: the batch size is not a multiple of the number of devices, or utilisation is out of range.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation={utilisation}: give a fraction of the peak, above 0 and at most 1")
    if num_devices < 1 or job.batch_size % num_devices:
        raise ValueError(f"--num_devices={num_devices}: data.batch_size={job.batch_size} must be a multiple of it")
    batch = typical_batch(job, job.batch_size // num_devices)
    cost, acts = _costs(job)
    for candidate in _candidates(job, device.kind):
        plan = _plan(candidate, batch, cost, acts, device, num_devices, fsdp, utilisation, _chooses_chunk_tokens(job))
        if plan.fits:
            break
    return plan


def plan_alike(plan: Plan, job: Job) -> Plan:
    """The plan of another job of the same LLM on the same devices, in chunks as large as those of ``plan``.

    Args:
        plan: as :func:`make_plan` gives it.
        job: the other job, a dataset of a mixture for instance; its chunk size and gradient checkpointing are not read.
    """
    job = replace(job, options=plan.job.options, chunk_size=plan.job.chunk_size, chunk_tokens=plan.job.chunk_tokens)
    batch = typical_batch(job, job.batch_size // plan.num_devices)
    keeps_graphs = plan.retained_tokens > 0
    return _plan(job, batch, *_costs(job), plan.device, plan.num_devices, plan.fsdp, plan.assumed, keeps_graphs)


def _costs(job: Job) -> tuple[ModelCost, Activations]:
    """The weights, FLOPs and activations of the job's LLM."""
    weight_dtype = _weight_dtype(job)
    model = meta_model(job.config, job.options, weight_dtype)
    return count_weights(model, job.options), activations(model, torch.bfloat16 if job.half else weight_dtype)


def _chooses_chunk_tokens(job: Job) -> bool:
    """Whether the chunk size is left to ``auto``."""
    return job.chunk_tokens is None and job.chunk_size is None and not job.full_batch


def _candidates(job: Job, kind: str) -> list[Job]:
    """The job with every value to try for options that are ``auto``, the fastest first.

    Gradient checkpointing is tried before chunks get very small.
    """
    setting = job.options.gradient_checkpointing
    candidates = []
    for checkpointing in (False, True) if setting == "auto" else (bool(setting),):
        options = replace(job.options, gradient_checkpointing=checkpointing)
        least = _MIN_TOKENS_BEFORE_CHECKPOINTING[kind] if setting == "auto" and not checkpointing else 0
        sizes: list[int | None] = [job.chunk_tokens]
        if _chooses_chunk_tokens(job):
            sizes = [size for size in _CHUNK_TOKENS[kind] if size >= least]
        candidates += [replace(job, options=options, chunk_tokens=size) for size in sizes]
    return candidates


def _plan(
    job: Job,
    batch: Batch,
    cost: ModelCost,
    acts: Activations,
    device: Device,
    num_devices: int,
    fsdp: bool,
    utilisation: float | None,
    retain: bool,
) -> Plan:
    """The plan of a job without ``auto``; ``retain``: use the memory left over to keep graphs of microbatches."""
    weight_dtype = _weight_dtype(job)
    compute = torch.bfloat16 if job.half else weight_dtype
    checkpointing = bool(job.options.gradient_checkpointing)
    causal = job.options.attention == "causal"
    work = step_work(batch, job.objective, causal, job.objective.share_prompts)
    whole = [slice(0, len(batch))]
    slices = whole if job.full_batch else chunk_slices(batch, job.chunk_size, job.chunk_tokens)
    chunks = [batch[s] for s in slices]
    generation = [learned_work(chunk, job.objective, job.objective.share_prompts) for chunk in chunks]
    vocabulary = cost.head // job.config.get_text_config().hidden_size
    block = max(64 * vocabulary, _BLOCK_LOGITS[device.kind])
    memory = predict(
        cost,
        acts,
        weight_bytes=weight_dtype.itemsize,
        compute_bytes=compute.itemsize,
        shards=num_devices if fsdp else 1,
        ddp_buckets=num_devices > 1 and not fsdp,
        frozen_copy=job.frozen_copy and job.objective.uses_reference,
        checkpointing=checkpointing,
        embed_tokens=max(float(embedding_work(c, causal).tokens) for c in chunks) if job.objective.uses_reps else 0,
        generation_tokens=max(float(w.tokens) for w in generation),
        single_chunk=len(chunks) == 1,
        head_logits=min(block, max(float(w.targets) for w in generation) * vocabulary),
        similarities=_num_similarities(job, len(batch), num_devices),
        quantization=job.options.quantization,
        kind=device.kind,
    )
    left = USABLE[device.kind] * device.memory_gib * GIB - memory.total
    retain = retain and left > 0 and len(chunks) > 1 and not (checkpointing or fsdp)
    bytes_per_token = (1 + FRAGMENTATION[device.kind]) * acts.saved
    retained = min(int(left / bytes_per_token), batch.num_tokens) if retain else 0
    # the share of the rows that GradCache embeds once more, first without gradient
    again = 1 - retained / batch.num_tokens if len(chunks) > 1 and job.objective.uses_reps else 0.0
    hardware = float(cost.hardware_step(work, False, checkpointing)) + again * float(cost.forward(work.embed))
    forwards = (1 + again + checkpointing) * work.embed.tokens + (1 + checkpointing) * work.learned.tokens
    forwards += work.scored.tokens + work.reference.tokens + work.guide.tokens
    backwards = work.embed.tokens + work.learned.tokens
    logits = vocabulary * (work.learned.targets + work.scored.targets + work.reference.targets)
    return Plan(
        job=job,
        device=device,
        num_devices=num_devices,
        fsdp=fsdp,
        weights=cost.parameters,
        trained=cost.trainable,
        chunks=len(chunks),
        memory=memory,
        retained_tokens=retained,
        retained_memory=retained * bytes_per_token,
        step_flops=float(cost.step(work)),
        hardware_flops=hardware,
        reference_flops=float(cost.forward(work.reference, adapters=False)),
        reference_traffic=float(acts.traffic * work.reference.tokens)
        + float(_BYTES_PER_LOGIT * vocabulary * work.reference.targets),
        traffic=float(acts.traffic * (forwards + _BACKWARD_TRAFFIC * backwards) + _BYTES_PER_LOGIT * logits),
        assumed=utilisation,
    )


def _weight_dtype(job: Job) -> torch.dtype:
    """The dtype of the LLM's weights: the option, or with ``auto`` the one in the config."""
    if job.options.dtype != "auto":
        return getattr(torch, job.options.dtype)
    stored = getattr(job.config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _num_similarities(job: Job, queries: int, num_devices: int) -> float:
    """Number of values in representations, their gradients, and similarities of the queries with all passages."""
    each = job.candidates + job.extra_positives
    passages = job.batch_size * each
    width = job.config.get_text_config().hidden_size
    return 3 * queries * (1 + each) * width + passages * width * (num_devices > 1) + 3 * queries * passages


def typical_batch(job: Job, queries: int) -> Batch:
    """A batch with lengths like the job's; passage lengths are lognormal with sigma 0.4, like MS MARCO's."""
    rng = np.random.default_rng(0)

    def passage_lengths(each: int) -> Tensor:
        spread = rng.lognormal(-(0.4**2) / 2, 0.4, queries * each)
        return _to_lengths(job.passage_tokens * spread, job.passage_max_length)

    passages, extra = passage_lengths(job.candidates), job.extra_positives
    query_lengths = _to_lengths(np.full(queries, job.query_tokens), job.query_max_length)
    prompts = _token_rows(_to_lengths(np.full(queries, job.prompt_tokens), 2**31))
    targets = _token_rows((passages + 1).clamp(max=job.passage_max_length))
    passages_in_template = _token_rows(passages + round(job.query_template_tokens))
    bare_lengths = _to_lengths(np.full(queries, job.bare_query_tokens + 1), job.query_max_length)
    return Batch(
        _token_rows(query_lengths),
        _token_rows(passages),
        torch.arange(queries * job.candidates).view(queries, -1),
        torch.arange(queries),
        GenerationRows(prompts, targets),
        query_generation=GenerationRows(passages_in_template, _token_rows(bare_lengths)),
        passage_generation=GenerationRows(prompts, targets),
        extra_positives=_token_rows(passage_lengths(extra)) if extra else None,
        extra_positive_keys=torch.arange(queries * extra).view(queries, -1) if extra else None,
    )


def _to_lengths(lengths: np.ndarray, max_length: int) -> Tensor:
    """Round to whole numbers from 1 to ``max_length``."""
    return torch.from_numpy(np.clip(np.rint(lengths), 1, max_length).astype(np.int64))


def _token_rows(lengths: Tensor) -> TokenRows:
    """Right-padded rows of these lengths; the token ids have no meaning."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return TokenRows(mask, mask)
