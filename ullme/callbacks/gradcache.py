"""GradCache as a Lightning callback: any batch size in the memory of one chunk."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, get_args

import lightning as L
import torch
from torch import Tensor

from ullme.batch import Batch
from ullme.callbacks.base import LossCallback
from ullme.distributed import any_rank, world
from ullme.engine import fsdp
from ullme.engine.gradcache import RandomState, chunk_rows, chunk_slices, count_retained, microbatch_rows
from ullme.engine.objective import Logs
from ullme.engine.reference import ReferenceChoice
from ullme.losses import Term

if TYPE_CHECKING:
    from ullme.planning.auto_chunk import Chunking
    from ullme.training.module import ULLMEModule

log = logging.getLogger(__name__)

OnOutOfMemory = Literal["fail", "halve_chunk"]


class GradCache(LossCallback):
    """Gradients of the whole batch, a chunk at a time (arXiv 2101.06983). The result does not depend on the chunks.

    A batch that fits into one chunk is done in one forward, without the first one.

    Args:
        terms: the terms of the objective; None is InfoNCE alone.
        chunk_size: queries in a chunk, each with all its candidates; null leaves it to chunk_tokens.
        chunk_tokens: real tokens in a chunk, for an even use of memory whatever the lengths; chunk_size goes first.
            Rows are embedded the longest first, and a query need not be in one chunk with its passages, except for
            generation terms. auto takes the largest that fits before training starts, says so, and embeds as many
            chunks only once as the rest of the memory holds: a batch that fits whole is done without GradCache's
            first forward.
        reference: π_ref of preference losses: the LLM with its adapters off; a frozen second copy, for full
            fine-tuning; or only what cache_reference holds.
        cache_reference: folder that keeps reference likelihoods for later epochs, seeds and methods.
        share_prompts: run a generation prompt once for all its targets, where the backbone can be packed.
        on_oom: out of memory: ``fail`` with the chunk to try next; ``halve_chunk`` does the step again with half of
            it, from then on, in a run of one process. The result does not depend on the chunk.

    Raises:
        ValueError: neither chunk_size nor chunk_tokens, one below 1, or an unknown on_oom; in training, out of memory.
    """

    def __init__(
        self,
        terms: list[Term] | None = None,
        chunk_size: int | None = None,
        chunk_tokens: int | Literal["auto"] | None = "auto",
        reference: ReferenceChoice = "adapters_off",
        cache_reference: str | None = None,
        share_prompts: bool = True,
        on_oom: OnOutOfMemory = "fail",
    ) -> None:
        super().__init__(terms, reference, cache_reference, share_prompts)
        if chunk_size is not None:
            chunk_tokens = None
        for name, value in (("chunk_size", chunk_size), ("chunk_tokens", chunk_tokens)):
            if isinstance(value, int) and value < 1:
                raise ValueError(f"loss.{name}={value}: must be at least 1")
        if chunk_size is None and chunk_tokens is None:
            raise ValueError("loss.chunk_size=null and loss.chunk_tokens=null: give one of them")
        if on_oom not in get_args(OnOutOfMemory):
            raise ValueError(f"loss.on_oom={on_oom!r}: choose {' or '.join(get_args(OnOutOfMemory))}")
        self.chunk_size = chunk_size
        self.chunk_tokens: int | None = None if chunk_tokens == "auto" else chunk_tokens
        self.on_oom = on_oom
        self.retained_tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        """Measure the teacher, and decide ``chunk_tokens: auto`` and ``gradient_checkpointing: auto``."""
        self.measure_teacher(trainer, pl_module.model)
        automatic = self.chunk_size is None and self.chunk_tokens is None
        resumed = self.chunking is not None
        if automatic or resumed or pl_module.model.options.gradient_checkpointing == "auto":
            chunking = self.decide_chunking(trainer, pl_module, self.fixed_chunk_tokens)
            self.apply_chunking(chunking)

    def apply_chunking(self, chunking: Chunking) -> None:
        """Use what was chosen, unless the options say a chunk."""
        if self.chunk_size is None and self.chunk_tokens is None:
            self.chunk_tokens, self.retained_tokens = chunking.chunk_tokens, chunking.retained_tokens

    def fixed_chunk_tokens(self, query_tokens: int, queries: int) -> int | None:
        """The most tokens of a chunk where the options say it; None for ``chunk_tokens: auto``.

        Args:
            query_tokens: the most that a query and its candidates may have.
            queries: of a batch, on one rank; a chunk may be smaller.
        """
        return self.chunk_size * query_tokens if self.chunk_size else self.chunk_tokens

    def _fits(self, batch: Batch) -> bool:
        """Whether the graphs of embedding and generation fit together, so that no forward has to be done twice."""
        passes = 2 if self._runs_generation(batch) else 1
        return self.chunk_tokens is None or passes * batch.num_tokens <= self.chunk_tokens

    def _runs_generation(self, batch: Batch) -> bool:
        """Whether a step on this batch runs the policy over generation rows: its dataset may name other terms."""
        return self.objective.of_terms(batch.terms).runs_generation

    def backward(self, module: ULLMEModule, batch: Batch) -> Logs:
        before = RandomState()
        while True:
            try:
                return self._backward(module, batch)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            # Outside of the except block the error, and with it the tensors that its frames hold, is freed.
            self._halve(batch, module.global_step, reason)
            for parameter in module.parameters():
                parameter.grad = None
            before.restore()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, batch: Batch, step: int, reason: str) -> None:
        """Halve the chunk that did not fit. Raises: ValueError: ``on_oom: fail``, or it cannot be halved."""
        name = "chunk_tokens" if self.chunk_size is None else "chunk_size"
        used = self.chunk_size or self.chunk_tokens or 1
        passes = 2 if self._runs_generation(batch) else 1
        half = min(used, len(batch) if self.chunk_size else passes * batch.num_tokens) // 2
        if self._is_smallest(batch) or half < 1:
            raise ValueError(
                f"out of memory in step {step} with the smallest chunk (loss.{name}={used}; {reason}); lower "
                "data.passage_max_length or data.num_hard_negatives, or set model.backbone.gradient_checkpointing=true"
            )
        if self.on_oom == "fail" or world()[1] > 1:
            also = ", or loss.on_oom=halve_chunk to go on by itself" if world()[1] == 1 else ""
            raise ValueError(
                f"out of memory in step {step} with loss.{name}={used} ({reason}); start again with "
                f"loss.{name}={half}{also}"
            )
        log.warning("out of memory in step %d: loss.%s=%d from here on, it was %d (%s)", step, name, half, used, reason)
        setattr(self, name, half)
        self.retained_tokens = 0

    def _backward(self, module: ULLMEModule, batch: Batch) -> Logs:
        chunks = self.chunks(batch)
        if not any_rank(len(chunks) > 1 or not self._fits(batch), batch.row_ids.device):
            return self.objective.full_batch(module.model, batch, module.manual_backward)
        microbatches = self.microbatches(batch)
        retained = 0
        if fsdp.split_by(module.model) is None:
            retained = count_retained(batch, microbatches, self.retained_tokens)
        return self.objective.grad_cache(
            module.model,
            batch,
            chunks,
            backward=module.manual_backward,
            no_sync=self.no_sync(module),
            microbatches=microbatches,
            num_retained=retained,
        )

    def chunks(self, batch: Batch) -> list[slice]:
        """Consecutive queries whose generation losses are computed together."""
        return chunk_slices(batch, self.chunk_size, self.chunk_tokens)

    def microbatches(self, batch: Batch) -> list[Tensor]:
        """Rows that are embedded together: places in ``batch.embedded``."""
        if self.chunk_tokens is None:
            return [chunk_rows(batch, chunk) for chunk in self.chunks(batch)]
        return microbatch_rows(batch, self.chunk_tokens)

    def _is_smallest(self, batch: Batch) -> bool:
        """Whether a chunk is one query, or one row where queries need not stay together."""
        if self.chunk_size or self._runs_generation(batch):
            return len(self.chunks(batch)) == len(batch)
        return len(self.microbatches(batch)) == len(batch.embedded_lengths)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out; on a CPU the error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
