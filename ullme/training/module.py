"""The LightningModule: building the model, optimizer steps, validation, and the content of checkpoints."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ullme.batch import Batch
from ullme.distributed import average_gradients, mean_of_each
from ullme.engine import fsdp
from ullme.engine.finite import NotFiniteError, check_finite
from ullme.models.config import BackboneConfig
from ullme.models.rank_zero import loading_on_rank_zero
from ullme.prompts import Prompts
from ullme.training import split_checkpoints
from ullme.training.atomic_checkpoints import install_atomic_io

if TYPE_CHECKING:
    from ullme.data.beir import BeirFolder
    from ullme.data.collator import EvalRows
    from ullme.engine.objective import Objective
    from ullme.models.ullme import ULLME


Schedule = Literal["linear", "cosine", "constant"]
_SCHEDULES: tuple[str, ...] = get_args(Schedule)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), its schedule and gradient clipping.

    Args:
        lr: peak learning rate; the paper's is 2e-4.
        weight_decay: of AdamW.
        betas: of AdamW.
        schedule: of the learning rate after warm-up.
        warmup: warm-up steps if 1 or more, else a fraction of all steps.
        gradient_clip_val: largest norm of the whole gradient; null does not clip.

    Raises:
        ValueError: an option is out of its range.
    """

    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "linear"
    warmup: float = 0.03
    gradient_clip_val: float | None = 1.0

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or a positive number"),
            ("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1"),
            ("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
            ("warmup", 0 <= self.warmup < math.inf, "a fraction from 0 to below 1, or a number of steps"),
            (
                "gradient_clip_val",
                self.gradient_clip_val is None or self.gradient_clip_val > 0,
                "a positive number, or null for no clipping",
            ),
        ):
            if not ok:
                raise ValueError(f"model.optimizer.{name}={getattr(self, name)} is out of range: choose {remedy}")


class Backward(Protocol):
    """The type of the callback under ``loss:`` for this module; see :class:`ullme.callbacks.LossCallback`."""

    objective: Objective

    def backward(self, module: ULLMEModule, batch: Batch) -> dict[str, Tensor]:
        """Add the gradient of the loss to the parameters' ``.grad``; returns the values to log, by name."""


class ULLMEModule(L.LightningModule):
    """Trains an embedding model. The callback under ``loss:`` computes the gradient; the rest of a step is here.

    Args:
        backbone: how to build the embedding model.
        prompts: the prompt contract: templates for queries, passages and generation.
        optimizer: AdamW and its schedule.
    """

    loss: Backward

    def __init__(
        self,
        backbone: BackboneConfig,
        prompts: Prompts = Prompts(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        super().__init__()
        self.backbone, self.prompts, self.optimizer_config = backbone, prompts, optimizer
        self.automatic_optimization = False
        # Checkpoints hold trained weights only; on_load_checkpoint checks that none is missing.
        self.strict_loading = False
        self.model: ULLME = None  # type: ignore[assignment]  # until configure_model

    def setup(self, stage: str) -> None:
        """Check the callbacks, and install atomic checkpoints, also if the trainer was built without the CLI.

        Raises:
            ValueError: a callback that cannot work here; see :mod:`ullme.callbacks.unsupported`.
        """
        from ullme.callbacks.unsupported import check_callbacks

        if stage == "fit":
            check_callbacks(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]
        install_atomic_io(self.trainer)

    def configure_model(self) -> None:
        """Build the model, once; Lightning calls this in each process, maybe repeatedly."""
        from ullme.models import ULLME

        if self.model is None:
            strategy = None if self._trainer is None else self.trainer.strategy
            splits = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
            with loading_on_rank_zero(strategy.root_device) if splits else nullcontext():
                model = ULLME(**self.backbone.to_dict(), prompts=self.prompts).train()
            self.model = self._shard(model)
            if self._trainer is not None:
                # Batches hold integers only, and Lightning's conversion of dtypes fails on frozen dataclasses.
                self.trainer.precision_plugin.convert_input = _identity

    def _shard(self, model: ULLME) -> ULLME:
        """Shard the LLM over ranks if the strategy is FSDP, version 1 or 2."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
            split_checkpoints.install(self, strategy)
        if isinstance(strategy, FSDPStrategy):
            return fsdp.shard_fsdp1(model, strategy.root_device, strategy.mixed_precision_config)
        if isinstance(strategy, ModelParallelStrategy):
            if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
                raise ValueError(
                    f"trainer.strategy.tensor_parallel_size={size}: tensor parallelism is not supported; set it to 1 "
                    f"and data_parallel_size to the number of processes ({strategy.world_size})"
                )
            return fsdp.shard_fsdp2(model, strategy.device_mesh["data_parallel"], strategy.root_device)
        return model

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step on one global batch.

        Raises:
            NotFiniteError: on every rank, a term or the gradient that is NaN or infinite.
        """
        self._seed_step()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        try:
            with self._without_ddp_sync():
                logs = self.loss.backward(self, batch)
            average_gradients(fsdp.whole_parameters(self.model))
            gradient_norm = fsdp.clip_gradients(self.model, self.optimizer_config.gradient_clip_val)
            check_finite("the gradient norm", gradient_norm, batch)
        except NotFiniteError as error:
            raise NotFiniteError(f"step {self.global_step}: {error}") from error
        optimizer.step()
        self._forget_logged()
        self.log("lr", optimizer.param_groups[0]["lr"])
        schedule: Any = self.lr_schedulers()
        schedule.step()
        means = mean_of_each({**logs, "grad_norm": gradient_norm})
        self.log("train/loss", means.pop("loss"), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{name}": value for name, value in means.items()}, batch_size=len(batch))
        return logs

    def _forget_logged(self) -> None:
        """Drop what earlier steps logged: a dataset may have other terms and metrics than the one before, and Lightning
        would log their last values again at every step that has no new ones."""
        for logged in (getattr(self.trainer, "_results", None) or {}).values():
            if logged.meta.fx == "training_step" and not logged.meta.on_epoch:
                logged.reset()

    def _seed_step(self) -> None:
        """Seed dropout by (seed, step, rank), so that a resumed run gets the same dropout as an uninterrupted one."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        entropy = np.random.SeedSequence([seed, self.global_step, self.global_rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def _without_ddp_sync(self) -> AbstractContextManager[Any]:
        """Turn off DDP's averaging in each backward, of which a step has several; the step averages once at the end."""
        return getattr(self.trainer.strategy.model, "no_sync", nullcontext)()

    def configure_optimizers(self) -> Any:
        """AdamW over the trained weights, with a schedule by optimizer steps.

        Raises:
            ValueError: the number of steps is unlimited.
        """
        from transformers import get_scheduler

        options = self.optimizer_config
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
        )
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise ValueError(
                "trainer.max_epochs=-1 without trainer.max_steps: the schedule needs a number of steps; "
                "give trainer.max_steps"
            )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = int(options.warmup if options.warmup >= 1 else options.warmup * total)
        name = "constant_with_warmup" if options.schedule == "constant" else options.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        self._monitors_checked = False

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After the first step, check what callbacks monitor; of several datasets, whose terms and metrics may differ,
        after the first epoch. Raises: ValueError: it is not logged."""
        from ullme.callbacks.unsupported import check_monitors_of_training

        several = len(getattr(self.trainer.datamodule, "datasets", None) or ()) > 1  # type: ignore[attr-defined]
        if not self._monitors_checked and (self.trainer.is_last_batch or not several):
            check_monitors_of_training(self.trainer)
            self._monitors_checked = True

    def on_validation_epoch_start(self) -> None:
        """Begin to rank the corpus for each query."""
        from ullme.training.retrieval_metrics import DEPTH
        from ullme.training.validation import CorpusRanking

        beir = self._beir()
        place = {name: n for n, name in enumerate(beir.corpus)}
        own_copies = [place[query] if query in beir.own_copies else None for query in beir.queries]
        sizes = len(beir.queries), len(beir.corpus), self.model.hidden_size
        self._ranking = CorpusRanking(*sizes, DEPTH, self.device, own_copies)

    def validation_step(self, batch: EvalRows, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed a batch of the queries (dataloader 0), or embed and rank one of the corpus (dataloader 1)."""
        rows = batch.rows
        rep = self.model(rows.input_ids, rows.attention_mask, pool_mask=rows.pool_mask, host=rows.host)["rep"]
        add = self._ranking.add_queries if dataloader_idx == 0 else self._ranking.add_passages
        add(rep, batch.indices)

    def on_validation_epoch_end(self) -> None:
        """Compute and log retrieval metrics, unless only a part of the data was embedded."""
        from ullme.training.retrieval_metrics import ranking_metrics

        ranking = self._ranking
        del self._ranking
        if not ranking.merge_ranks():
            rank_zero_warn(
                "validation: only a part of data.val was embedded (trainer.limit_val_batches, overfit_batches or "
                "fast_dev_run), so no retrieval metrics are logged"
            )
            return
        beir = self._beir()
        place = {name: n for n, name in enumerate(beir.corpus)}
        relevant = [{place[p]: grade for p, grade in beir.qrels[query].items()} for query in beir.queries]
        scores = ranking_metrics(ranking.best(), relevant)
        self.log_dict({f"val/{name}": value for name, value in scores.items()}, prog_bar=True, rank_zero_only=True)

    def _beir(self) -> BeirFolder:
        return self.trainer.datamodule.beir  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the trained weights, and add the contract from which the model is rebuilt."""
        from ullme.models.trained_weights import CONTRACT_KEY, STATE_PREFIX, contract

        trained = {STATE_PREFIX + name for name in fsdp.trainable_shapes(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint[CONTRACT_KEY] = contract(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise, before any weight is copied, if the checkpoint has another backbone, adapter, pooling or prompts."""
        from ullme.models.trained_weights import check_can_resume

        self.configure_model()
        if "state_dict" in checkpoint:  # else split_checkpoints has checked it
            check_can_resume(self.model, checkpoint)


def _identity(data: Any) -> Any:
    """Return the argument unchanged."""
    return data
