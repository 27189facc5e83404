"""The whole batch in one forward and one backward: the fastest way when it fits, and GradCache's oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullme.batch import Batch
from ullme.callbacks.base import Logs, LossCallback
from ullme.gradcache import embed_batch

if TYPE_CHECKING:
    from ullme.module import ULLMEModule


class FullBatch(LossCallback):
    """Keep the activations of the whole batch.

    Args:
        terms: the terms of the objective; None is InfoNCE alone.
    """

    def backward(self, module: ULLMEModule, batch: Batch) -> Logs:
        logs: Logs = {}
        reps = embed_batch(self.embed(module), batch)
        module.manual_backward(self.objective(batch, logs)(reps))
        return logs
