"""How much of a batch may be in memory at once: ``chunk_tokens: auto`` and ``gradient_checkpointing: auto``.

The activations of a token are counted from the model's own graph (:mod:`ullme.planning.memory`); free memory is asked
of the device. No Lightning here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullme.batch import Batch, ColumnKind, GenerationRows
from ullme.distributed import all_reduce_max, any_rank, no_collectives
from ullme.engine.gradcache import chunk_slices, count_retained, microbatch_rows
from ullme.engine.objective import Objective
from ullme.engine.reference import Reference
from ullme.models.attention.layers import token_table
from ullme.models.likelihood import _BLOCK_LOGITS
from ullme.planning.devices import free_memory
from ullme.planning.flops import meta_model
from ullme.planning.memory import FRAGMENTATION, GIB, Activations, activations
from ullme.token_rows import TokenRows

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

# The share of the free memory that a chunk may use: other processes need a CPU's memory too.
_USABLE = {"cpu": 0.5, "cuda": 0.9}
# Tokens beyond which a larger chunk is no faster, as the matrices are tall enough to keep the device busy.
_MOST = {"cpu": 2048, "cuda": 65536}
# Tokens below which a GPU is not busy; rather than take smaller chunks, layers are recomputed.
_LEAST = {"cpu": 256, "cuda": 8192}


@dataclass(frozen=True)
class Chunking:
    """What was chosen.

    Args:
        chunk_tokens: real tokens in a chunk.
        retained_tokens: tokens whose graphs may be kept besides a chunk's, so that they are embedded only once.
        checkpointing: recompute the layers in backward.
    """

    chunk_tokens: int
    retained_tokens: int
    checkpointing: bool

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Chunking:
        """From a checkpoint; version 0.1 called ``retained_tokens`` ``held_tokens``."""
        state = dict(state)
        state["retained_tokens"] = state.pop("held_tokens", state.get("retained_tokens"))
        return cls(**state)


def largest_chunk(
    model: ULLME, half: bool, least: int, chunk_tokens: int | None, free: float | None = None
) -> Chunking:
    """The largest chunk that fits, and whether it has to be recomputed layer by layer.

    Args:
        model: on the device that trains it.
        half: whether products are computed in bfloat16 by autocast.
        least: the most tokens that the smallest possible chunk may have.
        chunk_tokens: a chunk that is given; None chooses one.
        free: bytes; None asks the device.

    Raises:
        ValueError: not even the smallest chunk fits.
    """
    kind = "cpu" if model.device.type == "cpu" else "cuda"
    dtype = next(model.causal_lm.parameters()).dtype
    acts = activations(meta_model(model.causal_lm.config, model.options, dtype), torch.bfloat16 if half else dtype)
    room = _USABLE[kind] * (free_memory(model.device) if free is None else free)
    room = (room - _fixed(model, kind)) / (1 + FRAGMENTATION[kind]) * (1 if model.attention_path == "packed" else 0.5)
    wanted = model.options.gradient_checkpointing
    enough = max(least, chunk_tokens or _LEAST[kind])
    checkpointing = _bytes(acts, False) * enough > room if wanted == "auto" else bool(wanted)
    each = _bytes(acts, checkpointing)
    if chunk_tokens is None:
        chunk_tokens = int(min(room // each, max(_MOST[kind], least)))
        if chunk_tokens < least:
            raise ValueError(
                f"loss.chunk_tokens=auto: {max(room, 0) / GIB:.1f} GiB can be planned with, and the smallest chunk "
                f"({least} tokens) takes {least * each / GIB:.2f} GiB; lower "
                "data.passage_max_length or data.num_hard_negatives, or take a device with more memory"
            )
    retained = 0 if checkpointing else int(max(0, room - each * chunk_tokens) // acts.saved)
    return Chunking(chunk_tokens, retained, checkpointing)


def shrink_until_it_fits(
    model: ULLME,
    objective: Objective,
    chunking: Chunking,
    passages: int,
    passage_tokens: int,
    autocast: Callable[[], AbstractContextManager],
    queries: int = 2**31,
    datasets: Sequence[tuple[tuple[str, ...] | None, Mapping[str, ColumnKind]]] = ((None, {}),),
) -> Chunking:
    """Try a step on random tokens, and with less in memory until it fits; nothing is learned.

    First fewer graphs are retained, then chunks are halved as long as they keep a GPU busy, and only then, if that is
    ``auto``, are layers recomputed, in chunks of the first size: that costs a third more time, smaller chunks next to
    none. Then chunks are halved again. All ranks end with the same choice.

    Args:
        model: on the device that trains it. Its layers are recomputed from here on where that was chosen.
        objective: of the run; π_ref is left out.
        chunking: what to try.
        passages: candidates of a query.
        passage_tokens: of each.
        autocast: what a step runs under.
        queries: the most that a batch of this rank has.
        datasets: of each kind of batch the names of its terms (None: all), and its columns of numbers.

    Raises:
        ValueError: not even one query fits.
    """
    terms = Objective(objective.terms, _NoReference(), objective.share_prompts)
    auto = model.options.gradient_checkpointing == "auto"
    first, least = chunking.chunk_tokens, _LEAST["cpu" if model.device.type == "cpu" else "cuda"]
    while True:
        if chunking.checkpointing and auto:
            model.recompute_layers()
        tokens = chunking.chunk_tokens + chunking.retained_tokens
        batch = _random_batch(model, tokens, queries, passages, passage_tokens)
        trials = [replace(batch, terms=of, columns=_no_numbers(batch, kinds)) for of, kinds in datasets]
        if not any_rank(any(_runs_out(model, terms, one, chunking, autocast) for one in trials), model.device):
            return chunking
        if chunking.retained_tokens > chunking.chunk_tokens:
            chunking = replace(chunking, retained_tokens=chunking.retained_tokens // 2)
        elif chunking.retained_tokens:
            chunking = replace(chunking, retained_tokens=0)
        elif auto and not chunking.checkpointing and (len(batch) == 1 or chunking.chunk_tokens // 2 < least):
            chunking = replace(chunking, chunk_tokens=first, checkpointing=True)
        elif len(batch) > 1:
            chunking = replace(chunking, chunk_tokens=min(chunking.chunk_tokens, batch.num_tokens) // 2)
        else:
            raise ValueError(
                f"out of memory on {model.device} with one query of {batch.num_tokens} tokens in a chunk; lower "
                "data.passage_max_length or data.num_hard_negatives, take a device with more memory, or set the "
                "environment variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which wastes less of it"
            )


def _runs_out(
    model: ULLME,
    terms: Objective,
    batch: Batch,
    chunking: Chunking,
    autocast: Callable[[], AbstractContextManager],
) -> bool:
    """Whether a step runs out of memory. It asks no other rank: one of them may."""
    chunks = chunk_slices(batch, None, chunking.chunk_tokens)
    microbatches = microbatch_rows(batch, chunking.chunk_tokens)
    retained = count_retained(batch, microbatches, chunking.retained_tokens)
    moments: list[Tensor] = []
    try:
        moments.append(_room_for_moments(model))  # a training step has AdamW's moments in memory too
        with autocast(), no_collectives():
            terms.grad_cache(model, batch, chunks, microbatches=microbatches, num_retained=retained)
    except torch.OutOfMemoryError:
        return True
    finally:
        moments.clear()
        _free(model)
    return False


def _free(model: ULLME) -> None:
    """Give back the gradients of a trial."""
    for parameter in model.parameters():
        parameter.grad = None
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def fit_by_measurement(
    model: ULLME,
    objective: Objective,
    chunking: Chunking,
    passages: int,
    passage_tokens: int,
    autocast: Callable[[], AbstractContextManager],
    free: float,
    peak: Callable[[Callable[[], object]], float] | None = None,
    datasets: Sequence[tuple[tuple[str, ...] | None, Mapping[str, ColumnKind]]] = ((None, {}),),
) -> Chunking:
    """:func:`shrink_until_it_fits` where the LLM is split over ranks, and running out of memory would leave them stuck.

    Two small steps on random tokens are measured, and the memory of a larger chunk follows from their difference. The
    rank that needs the most decides for all.

    Args:
        free: bytes that may be used, the same on every rank.
        peak: runs something and returns the bytes that it took at the height; None measures on CUDA.

    The other arguments are those of :func:`shrink_until_it_fits`.

    Raises:
        ValueError: not even one query fits.
    """
    terms = Objective(objective.terms, _NoReference(), objective.share_prompts)
    auto = model.options.gradient_checkpointing == "auto"
    least = _LEAST["cpu" if model.device.type == "cpu" else "cuda"]
    usable = _USABLE["cuda"] * free - 2 * sum(_local_bytes(p) for p in model.parameters() if p.requires_grad)

    def measured(queries: int) -> tuple[int, int]:
        """Tokens of a step with so many queries in one chunk, and its bytes on the rank that needs the most."""
        batch = _random_batch(model, 0, queries, passages, passage_tokens, at_least=queries)

        def step(one: Batch) -> None:
            with autocast():
                terms.grad_cache(model, one, [slice(0, len(one))])

        used = 0
        for of, kinds in datasets:
            one = replace(batch, terms=of, columns=_no_numbers(batch, kinds))
            used = max(used, int((_cuda_peak if peak is None else peak)(partial(step, one))))
            _free(model)
        return batch.num_tokens, all_reduce_max(used, model.device)

    while True:
        if chunking.checkpointing and auto:
            model.recompute_layers()
        (tokens, one), (more, two) = measured(1), measured(2)
        each = max(1.0, (two - one) / (more - tokens))
        fits = int(tokens + (usable - one) / each)
        if fits >= (least if auto and not chunking.checkpointing else tokens):
            return replace(chunking, chunk_tokens=min(chunking.chunk_tokens, fits), retained_tokens=0)
        if not auto or chunking.checkpointing:
            raise ValueError(
                f"out of memory on {model.device}: one query of {tokens} tokens takes {one / GIB:.1f} GiB, and "
                f"{usable / GIB:.1f} are free; lower data.passage_max_length or data.num_hard_negatives, or take more "
                "devices"
            )
        chunking = replace(chunking, checkpointing=True)


def _cuda_peak(run: Callable[[], object]) -> float:
    """Bytes of tensors on the current device at the height of a run, less those that were there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _room_for_moments(model: ULLME) -> Tensor:
    """As many bytes as AdamW's two moments, which do not exist before the first step."""
    trained = sum(_local_bytes(p) for p in model.parameters() if p.requires_grad)
    return torch.empty(2 * trained, dtype=torch.uint8, device=model.device)


def _local_bytes(parameter: Tensor) -> int:
    """Of the part that this rank holds."""
    return getattr(parameter, "_local_tensor", parameter).numel() * parameter.element_size()


class _NoReference(Reference):
    """Stands in for π_ref in a trial: zeros, without a forward."""

    def prepare(self, model: ULLME, precision: str, likelihoods: Any = ()) -> None: ...

    def logps(self, model: ULLME, batch: Batch, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(mask.shape, device=model.device)


def _random_batch(model: ULLME, tokens: int, most: int, passages: int, passage_tokens: int, at_least: int = 1) -> Batch:
    """Queries as long as their passages, so many that ``tokens`` holds them, or ``most``."""
    queries = max(at_least, min(most, tokens // ((1 + passages) * passage_tokens)))
    vocabulary = len(token_table(model.causal_lm))

    def rows(n: int) -> TokenRows:
        ids = torch.randint(vocabulary, (n, passage_tokens))
        return TokenRows(ids, torch.ones_like(ids))

    keys = torch.arange(queries * passages).view(queries, passages)
    asked, answers = rows(queries), rows(queries * passages)
    given_query, given_passage = GenerationRows(asked, answers), GenerationRows(answers, asked)
    batch = Batch(
        asked,
        answers,
        keys,
        torch.arange(queries),
        given_query,
        query_generation=given_passage,
        passage_generation=given_query,
    )
    return batch.to(model.device)


def _no_numbers(batch: Batch, kinds: Mapping[str, ColumnKind]) -> dict[str, Tensor]:
    """Columns as the training rows have them, all NaN."""
    shapes = {"query": batch.passage_keys.shape[:1], "candidate": batch.passage_keys.shape}
    nothing = {kind: torch.full(shape, float("nan"), device=batch.row_ids.device) for kind, shape in shapes.items()}
    return {name: nothing[kind] for name, kind in kinds.items()}


def _bytes(acts: Activations, checkpointing: bool) -> float:
    """Of one token at the height of forward and backward."""
    return acts.peak(1, checkpointing)


def _fixed(model: ULLME, kind: str) -> float:
    """Bytes that training takes whatever the chunk: gradients, AdamW's moments, a block of logits."""
    trained = sum(_local_bytes(p) for p in model.parameters() if p.requires_grad)
    return 3 * trained + 12 * _BLOCK_LOGITS[kind]
