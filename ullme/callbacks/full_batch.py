"""The whole batch in one forward and one backward: fastest where it fits, and what GradCache is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullme.batch import Batch
from ullme.callbacks.base import LossCallback
from ullme.engine.objective import Logs

if TYPE_CHECKING:
    from ullme.training.module import ULLMEModule


class FullBatch(LossCallback):
    """Keep the activations of the whole batch. Arguments: :class:`~ullme.callbacks.LossCallback`."""

    def backward(self, module: ULLMEModule, batch: Batch) -> Logs:
        return self.objective.full_batch(module.model, batch, module.manual_backward)
