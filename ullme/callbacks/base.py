"""A loss callback owns *backward*: the module asks it for gradients and keeps zero_grad, clipping and the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from ullme.batch import Batch, Representations, TokenRows
from ullme.losses import InfoNCE, RepresentationLoss

if TYPE_CHECKING:
    from ullme.module import ULLMEModule

Logs = dict[str, Tensor]


class LossCallback(L.Callback, ABC):
    """Base of everything that may stand under ``loss:`` in a config.

    Args:
        terms: the terms of the objective; None is InfoNCE alone.

    Raises:
        ValueError: no terms, or two of the same name.
    """

    def __init__(self, terms: list[RepresentationLoss] | None = None) -> None:
        self.terms = [InfoNCE()] if terms is None else terms
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"loss.terms={names}: give at least one term, and each kind once")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over the module's backward.

        Raises:
            ValueError: a second loss, or a precision whose gradient scaler this does not drive.
        """
        if stage != "fit":
            return
        others = [c for c in trainer.callbacks if isinstance(c, LossCallback) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise ValueError(f"loss: {type(self).__name__} and {type(others[0]).__name__}; a run has one loss")
        if str(trainer.precision).startswith("16"):
            raise ValueError(f"trainer.precision={trainer.precision!r} is not supported; choose bf16-mixed or 32-true")
        pl_module.loss = self

    @abstractmethod
    def backward(self, module: ULLMEModule, batch: Batch) -> Logs:
        """Add the objective's gradient to the parameters' ``.grad``.

        Returns:
            What to log: ``loss`` and every unweighted term, detached.
        """

    def objective(self, batch: Batch, logs: Logs) -> Callable[[Representations], Tensor]:
        """Representations -> the weighted sum of the terms; each term is checked, and noted in ``logs``."""

        def total(reps: Representations) -> Tensor:
            values = {term.name: term(reps) for term in self.terms}
            for name, value in values.items():
                _check_finite(name, value, batch)
                logs[name] = value.detach()
            loss = torch.stack([term.weight * values[term.name] for term in self.terms]).sum()
            logs["loss"] = loss.detach()
            return loss

        return total

    @staticmethod
    def embed(module: ULLMEModule) -> Callable[[TokenRows], Tensor]:
        """(R, L) token rows -> (R, D), through the module's model."""
        return lambda rows: module.model(rows.input_ids, rows.attention_mask)["rep"]

    @staticmethod
    def no_sync(module: ULLMEModule) -> Callable[[], AbstractContextManager]:
        """Backward without synchronising gradients over ranks, where the strategy's wrapper can."""
        return getattr(module.trainer.strategy.model, "no_sync", nullcontext)


def _check_finite(name: str, value: Tensor, batch: Batch) -> None:
    if not torch.isfinite(value):
        rows = batch.row_ids.tolist()
        shown = f"{rows[:16]}{' ...' if len(rows) > 16 else ''}"
        raise ValueError(
            f"{name} is {value.item()} (training rows {shown}); lower model.optimizer.lr, clip gradients "
            "(model.optimizer.gradient_clip_val), or look at these rows"
        )
