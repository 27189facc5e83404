"""Base of the callbacks under ``loss:``, which compute the gradient; the module clips it and steps the optimizer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ullme.batch import Batch
from ullme.callbacks.choose_chunking import choose_chunking
from ullme.data.short_rows import check_no_row_borrows
from ullme.engine.fsdp import unsynchronised
from ullme.engine.objective import Logs, Objective
from ullme.engine.reference import ReferenceChoice, make_reference
from ullme.engine.teacher_quality import measure_teacher, taught_term
from ullme.losses import InfoNCE, Term
from ullme.planning.auto_chunk import Chunking
from ullme.training.negatives import check_negatives, contrastive
from ullme.training.rows import check_rows, datasets_for_teacher

if TYPE_CHECKING:
    from ullme.training.module import ULLMEModule

log = logging.getLogger(__name__)


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
            ValueError: a second loss, a precision whose gradient scaler this does not drive, or rows that a term
                cannot use.
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
        if (data := trainer.datamodule) is not None:  # type: ignore[attr-defined]
            self._check_negatives(data)
        check_rows(self.objective, data, warn=trainer.is_global_zero)
        pl_module.loss = self

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an objective that this model cannot serve, before the first step."""
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
        self.objective.check_model(model, str(trainer.precision))
        model.matryoshka_dims = self.objective.matryoshka_dims  # kept in checkpoints

    def measure_teacher(self, trainer: L.Trainer, model: Any) -> None:
        """Log how well the teacher of a KL ranks, with a warning where it is at chance; not in a resumed run.

        To be called once a checkpoint is restored: FSDP2 cannot copy weights in after a forward.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        term = taught_term(self.objective)
        if term is None or not hasattr(data, "first_batches") or trainer.global_step > 0:
            return
        datasets = datasets_for_teacher(data, term.name)
        if not datasets:
            rank_zero_info("the teacher of the KL is not measured: no training rows have labels and hard negatives")
            return
        batches = data.first_batches(model.prompt_tokenizer, self.objective.likelihoods, datasets=datasets)
        with trainer.precision_plugin.forward_context():
            quality = measure_teacher(self.objective, model, batches)
        if quality is not None and quality.at_chance:
            rank_zero_warn(f"{quality}: {quality.remedy}")
        elif quality is not None:
            rank_zero_info(str(quality))

    def on_train_start(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        """Measure the teacher, and decide ``gradient_checkpointing: auto`` for a batch that is in memory whole."""
        self.measure_teacher(trainer, pl_module.model)
        if pl_module.model.options.gradient_checkpointing == "auto":
            self.decide_chunking(trainer, pl_module, lambda query_tokens, queries: query_tokens * queries)

    def decide_chunking(
        self, trainer: L.Trainer, pl_module: ULLMEModule, fixed_chunk_tokens: Callable[[int, int], int | None]
    ) -> Chunking:
        """The chunking of a resumed run, since sums round by it, or else the one chosen for this machine.

        Args:
            trainer: of the run.
            pl_module: of the run; its layers are recomputed from here on where that was chosen.
            fixed_chunk_tokens: see :func:`~ullme.callbacks.choose_chunking.choose_chunking`.
        """
        if self.chunking is None:
            self.chunking = choose_chunking(trainer, pl_module, self.objective, fixed_chunk_tokens)
        if self.chunking.checkpointing and pl_module.model.options.gradient_checkpointing == "auto":
            pl_module.model.recompute_layers()
        return self.chunking

    def state_dict(self) -> dict[str, Any]:
        return {} if self.chunking is None else asdict(self.chunking)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.chunking = Chunking.from_state(state_dict) if state_dict else None

    def _check_negatives(self, data: Any) -> None:
        rows, negatives = getattr(data, "batch_size", 0), getattr(data, "num_hard_negatives", 1)
        parts = []  # terms and N of each dataset
        for one in getattr(data, "datasets", None) or []:
            terms = self.objective.of_terms(one.terms).terms
            own = negatives if one.num_hard_negatives is None else one.num_hard_negatives
            check_negatives(terms, rows, own, one.in_batch_negatives, f" of {one.train!r}")
            parts.append((terms, own))
        if not parts:
            check_negatives(self.objective.terms, rows, negatives)
            parts.append((self.objective.terms, negatives))
        for (terms, own), source in zip(parts, getattr(data, "sources", []), strict=False):  # none before setup
            for term in contrastive(terms):
                if not term.in_batch_negatives:
                    check_no_row_borrows(source, own, data.short_rows, f"loss term {term.name}", data.source)

    def _check_lengths(self, model: Any, data: Any) -> None:
        longest = {name: getattr(data, name, 0) for name in ("query_max_length", "passage_max_length")}
        for name, value in longest.items():
            if value > model.max_positions:
                raise ValueError(f"data.{name}={value}, but the LLM has {model.max_positions} positions; lower it")
        own = getattr(getattr(data, "source", None), "longest_instruction", None)
        for kind in self.objective.likelihoods:
            role: Any = "query_generation" if kind == "query_given_passage" else "generation"
            template = model.prompt_tokenizer.prompt_overhead(role, [None, own])
            if (total := template + sum(longest.values())) > model.max_positions:
                raise ValueError(
                    f"generation terms put a query ({longest['query_max_length']} tokens), its template ({template}: "
                    f"prompts.{role}) and a passage ({longest['passage_max_length']}) into one row of up to {total} "
                    f"tokens, but the LLM has {model.max_positions} positions; lower data.passage_max_length"
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
