"""GradCache as a Lightning callback: any batch size in the memory of one chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullme.batch import Batch
from ullme.callbacks.base import LossCallback, ReferenceChoice
from ullme.distributed import any_rank
from ullme.gradcache import chunk_slices
from ullme.losses import Term
from ullme.objective import Logs

if TYPE_CHECKING:
    from ullme.module import ULLMEModule


class GradCache(LossCallback):
    """Gradients of the whole batch, a chunk at a time (arXiv 2101.06983). The result does not depend on the chunks.

    A batch that fits into one chunk is done in one forward, without the first one.

    Args:
        terms: the terms of the objective; None is InfoNCE alone.
        chunk_size: queries in a chunk, each with all its candidates; null leaves it to chunk_tokens.
        chunk_tokens: real tokens in a chunk, for an even use of memory whatever the lengths; chunk_size goes first.
        reference: as in :class:`~ullme.callbacks.LossCallback`.
        cache_reference: likewise.
        share_prompts: likewise.

    Raises:
        ValueError: neither chunk_size nor chunk_tokens, or one below 1.
    """

    def __init__(
        self,
        terms: list[Term] | None = None,
        chunk_size: int | None = None,
        chunk_tokens: int | None = 16384,
        reference: ReferenceChoice = "adapters_off",
        cache_reference: str | None = None,
        share_prompts: bool = True,
    ) -> None:
        super().__init__(terms, reference, cache_reference, share_prompts)
        if chunk_size is not None:
            chunk_tokens = None
        for name, value in (("chunk_size", chunk_size), ("chunk_tokens", chunk_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"loss.{name}={value}: must be at least 1")
        if chunk_size is None and chunk_tokens is None:
            raise ValueError("loss.chunk_size=null and loss.chunk_tokens=null: give one of them")
        self.chunk_size, self.chunk_tokens = chunk_size, chunk_tokens

    def _fits(self, batch: Batch) -> bool:
        """Whether the graphs of embedding and generation fit together, so that no forward has to be done twice."""
        passes = 2 if self.objective.needs_generation else 1
        return self.chunk_tokens is None or passes * batch.num_tokens <= self.chunk_tokens

    def backward(self, module: ULLMEModule, batch: Batch) -> Logs:
        slices = chunk_slices(batch, self.chunk_size, self.chunk_tokens)
        if not any_rank(len(slices) > 1 or not self._fits(batch), batch.row_ids.device):
            return self.objective.full_batch(module.model, batch, module.manual_backward)
        return self.objective.grad_cache(module.model, batch, slices, module.manual_backward, self.no_sync(module))
