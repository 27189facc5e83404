"""A loss callback owns *backward*: the module asks it for gradients and keeps zero_grad, clipping and the step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from torch import Tensor

from ullme.batch import Batch
from ullme.callbacks.settle import settle
from ullme.engine.fsdp import unsynchronised
from ullme.engine.gradcache import slice_rows
from ullme.engine.objective import Logs, Objective
from ullme.engine.reference import AdaptersOff, Cached, FrozenCopy, Reference
from ullme.losses import InfoNCE, Term
from ullme.planning.auto_chunk import Chunking

if TYPE_CHECKING:
    from ullme.training.module import ULLMEModule

log = logging.getLogger(__name__)

ReferenceChoice = Literal["adapters_off", "frozen_copy", "cached"]


class LossCallback(L.Callback, ABC):
    """Base of everything that may stand under ``loss:`` in a config.

    Args:
        terms: the terms of the objective; None is InfoNCE alone.
        reference: π_ref of preference losses: the LLM with its adapters off; a frozen second copy, for full
            fine-tuning; or only what cache_reference holds.
        cache_reference: folder that keeps reference likelihoods for later epochs, seeds and methods.
        share_prompts: run a query's generation prompt once for all its candidates, where the backbone can be packed.

    Raises:
        ValueError: no terms, two of the same name, or ``reference: cached`` without a folder.
    """

    def __init__(
        self,
        terms: list[Term] | None = None,
        reference: ReferenceChoice = "adapters_off",
        cache_reference: str | None = None,
        share_prompts: bool = True,
    ) -> None:
        terms = [InfoNCE()] if terms is None else terms
        self.chunking: Chunking | None = None
        self.objective = Objective(terms, make_reference(reference, cache_reference), share_prompts)

    def setup(self, trainer: L.Trainer, pl_module: ULLMEModule, stage: str) -> None:  # type: ignore[override]
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
        if trainer.precision == "bf16-true":
            raise ValueError(
                "trainer.precision='bf16-true' would keep trained weights and optimizer states in bfloat16, which "
                "rounds small updates away; choose bf16-mixed, with model.backbone.dtype=bfloat16 for a frozen LLM in "
                "half the memory"
            )
        pl_module.loss = self

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an objective that this model or data cannot serve, before the first step."""
        model: Any = pl_module.model
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            self._check_lengths(model, data)
        half = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4})
        if half:
            log.warning(
                "model.backbone.dtype: the trained weights are in %s, where AdamW's small updates round away; "
                "set model.backbone.dtype=float32 (adapters are in float32 anyway)",
                ", ".join(half),
            )
        negatives = getattr(data, "num_hard_negatives", 1)
        self.objective.check(model, negatives, str(trainer.precision))

    def on_train_start(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        """Choose what is left to ``auto``, unless a checkpoint brought the choice: sums round by it."""
        options = pl_module.model.options
        if self.chunking is None and (self.settled_tokens(1, 1) is None or options.gradient_checkpointing == "auto"):
            self.chunking = settle(trainer, pl_module, self)
        if self.chunking is not None:
            self.use(self.chunking)
            if self.chunking.checkpointing and options.gradient_checkpointing == "auto":
                pl_module.model.recompute_layers()

    def settled_tokens(self, query_tokens: int, queries: int) -> int | None:
        """The most tokens in memory at once, if the options say it.

        Args:
            query_tokens: the most that a query and its candidates may have.
            queries: of a batch, on one rank.
        """
        return None

    def slices(self, batch: Batch) -> list[slice]:
        """Queries whose generation losses are computed together."""
        return [slice(0, len(batch))]

    def pieces(self, batch: Batch) -> list[Tensor]:
        """Rows that are embedded together: places among all queries and then all passages."""
        return [slice_rows(batch, part) for part in self.slices(batch)]

    def use(self, chunking: Chunking) -> None:
        """Take what was chosen for what the options leave open."""

    def state_dict(self) -> dict[str, Any]:
        return {} if self.chunking is None else asdict(self.chunking)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.chunking = Chunking(**state_dict) if state_dict else None

    def _check_lengths(self, model: Any, data: Any) -> None:
        longest = {name: getattr(data, name, 0) for name in ("query_max_length", "passage_max_length")}
        for name, value in longest.items():
            if value > model.max_positions:
                raise ValueError(f"data.{name}={value}, but the LLM has {model.max_positions} positions; lower it")
        if self.objective.needs_generation:
            own = getattr(getattr(data, "source", None), "longest_instruction", None)
            rows = model.prompt_tokenizer.prompt_ids(["", ""], max_length=2**31, instruction=[None, own])
            template = max(map(len, rows))
            if (total := template + sum(longest.values())) > model.max_positions:
                raise ValueError(
                    f"generation terms put a query ({longest['query_max_length']} tokens), its template ({template}) "
                    f"and a passage ({longest['passage_max_length']}) into one row of up to {total} tokens, but the "
                    f"LLM has {model.max_positions} positions; lower data.passage_max_length"
                )

    @abstractmethod
    def backward(self, module: ULLMEModule, batch: Batch) -> Logs:
        """Add the objective's gradient to the parameters' ``.grad``.

        Returns:
            What to log: ``loss``, every unweighted term and the terms' metrics, detached.
        """

    @staticmethod
    def no_sync(module: ULLMEModule) -> Callable[[], AbstractContextManager]:
        """Backward without synchronising gradients over ranks, where weights are split over them."""
        return partial(unsynchronised, module.model)


def make_reference(choice: ReferenceChoice, folder: str | None) -> Reference:
    """The reference that a config names. Raises: ValueError: ``cached`` without a folder."""
    if choice == "cached":
        if folder is None:
            raise ValueError("loss.reference=cached needs loss.cache_reference, the folder that holds the likelihoods")
        return Cached(folder, None)
    source = FrozenCopy() if choice == "frozen_copy" else AdaptersOff()
    return source if folder is None else Cached(folder, source)
