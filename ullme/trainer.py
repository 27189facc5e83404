"""The paper's training API, on a plain PyTorch DataLoader and without Lightning's Trainer; the same engine inside."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch

from ullme.batch import Batch, ColumnKind
from ullme.distributed import average_gradients, broadcast, mean_over_ranks, world
from ullme.engine.finite import NotFiniteError, check_finite
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.engine.presets import Generation, grl_terms
from ullme.engine.reference import ReferenceChoice, make_reference
from ullme.losses.base import Direction
from ullme.losses.kl import Teacher
from ullme.training.negatives import check_negatives
from ullme.training.rows import check_columns, check_positives

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME


class GradCacheTrainer:
    """Contrastive learning, a generation loss and the KL between them, with GradCache and AdamW.

    Example::

        data = ULLMEDataModule(train="train.jsonl", batch_size=32)
        train_data_loader = data.train_dataloader_for(model.prompt_tokenizer, generation=True)
        trainer = GradCacheTrainer(con_loss_type="NTXentLoss", gen_loss_type="dpo", use_kl_loss=True)
        trainer.fit_epoch(model=model, train_loader=train_data_loader)

    Args:
        con_loss_type: NTXentLoss, which is InfoNCE over cosines with a temperature; InfoNCE is the same.
        gen_loss_type: sft, dpo, kto, cpo or None.
        use_kl_loss: tie P_rt and P_gen together.
        temperature: τ of the contrastive loss.
        beta: β of the preference loss.
        con_weight: λ_CL.
        gen_weight: λ_DPO.
        kl_weight: λ_KL.
        lr: of AdamW, constant.
        chunk_size: queries in a chunk.
        gradient_clip_val: largest gradient norm; None does not clip.
        reference: adapters_off, frozen_copy or cached, as under ``loss:`` in a config.
        cache_reference: folder that keeps reference likelihoods.
        direction: what the generation loss and the KL generate: passage_given_query, as the paper, query_given_passage,
            or (the KL alone) gain.
        teacher: whose likelihoods the KL compares with: the policy's, as the paper, or the reference's.
        precision: bf16-mixed computes in bfloat16 under autocast; 32-true computes in the weights' dtype.
        show_progress_bar: a bar with the loss.

    Raises:
        ValueError: an unknown loss or precision.
    """

    def __init__(
        self,
        con_loss_type: Literal["NTXentLoss", "InfoNCE"] = "NTXentLoss",
        gen_loss_type: Generation | None = None,
        use_kl_loss: bool = False,
        *,
        temperature: float = 0.05,
        beta: float = 0.1,
        con_weight: float = 1.0,
        gen_weight: float = 0.5,
        kl_weight: float = 1.0,
        lr: float = 2e-4,
        chunk_size: int = 4,
        gradient_clip_val: float | None = 1.0,
        reference: ReferenceChoice = "adapters_off",
        cache_reference: str | None = None,
        direction: Direction = "passage_given_query",
        teacher: Teacher = "policy",
        precision: Literal["bf16-mixed", "32-true"] = "32-true",
        show_progress_bar: bool = True,
    ) -> None:
        if con_loss_type not in ("NTXentLoss", "InfoNCE"):
            raise ValueError(f"con_loss_type={con_loss_type!r}: choose NTXentLoss (or InfoNCE, the same)")
        if precision not in ("bf16-mixed", "32-true"):
            raise ValueError(f"precision={precision!r}: choose bf16-mixed or 32-true")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
        terms = grl_terms(
            gen_loss_type,
            use_kl_loss,
            temperature=temperature,
            beta=beta,
            contrastive_weight=con_weight,
            generation_weight=gen_weight,
            kl_weight=kl_weight,
            direction=direction,
            teacher=teacher,
        )
        self.objective = Objective(terms, make_reference(reference, cache_reference))
        self.lr, self.chunk_size, self.gradient_clip_val = lr, chunk_size, gradient_clip_val
        self.precision, self.show_progress_bar = precision, show_progress_bar
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 0

    def fit_epoch(self, model: ULLME, train_loader: Iterable[Batch]) -> list[dict[str, float]]:
        """Train on every batch once. A second call goes on with the same optimizer state.

        In a process group (torchrun) every rank calls it with a loader of its own share of each global batch.

        Args:
            model: the embedder, on the device to train on; afterwards it is in the mode (train or eval) it was in.
            train_loader: yields :class:`~ullme.batch.Batch`, with generation rows if a loss needs them:
                ``train_dataloader_for(..., generation=trainer.objective.likelihoods)``.

        Returns:
            For each step the loss, every term and the metrics, of the global batch; ``grad_norm`` before clipping,
            and ``tokens/s``, real tokens of queries and passages over all ranks.

        Raises:
            ValueError: batches without the rows that a loss needs, a reference that cannot be had, or a loss or
                gradient that is not finite: the message has the step, the term and the rows.
        """
        from tqdm.auto import tqdm

        parameters = [p for p in model.parameters() if p.requires_grad]
        held = [p for group in self.optimizer.param_groups for p in group["params"]] if self.optimizer else []
        if [id(p) for p in held] != [id(p) for p in parameters]:  # the first call, or another model
            broadcast(parameters)  # every rank drew its own adapter
            self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
            self.steps = 0
        history: list[dict[str, float]] = []
        bar = tqdm(train_loader, desc="train", unit="step", disable=not self.show_progress_bar)
        was_training = model.training
        model.train()
        try:
            for batch in bar:
                if not history:
                    self._check(model, batch)
                try:
                    history.append(self._step(model, batch.to(model.device), parameters))
                except NotFiniteError as error:
                    raise NotFiniteError(f"step {self.steps}: {error}") from error
                self.steps += 1
                bar.set_postfix(loss=f"{history[-1]['loss']:.3f}")
        finally:
            model.train(was_training)
        return history

    def _check(self, model: ULLME, batch: Batch) -> None:
        """Before the first step. Raises: ValueError: the batches do not have what the objective needs."""
        hard_negatives = batch.num_candidates - 1
        self.objective.check(model, hard_negatives, self.precision, batch.labelled)
        model.matryoshka_dims = self.objective.matryoshka_dims  # kept in checkpoints
        kinds: dict[str, ColumnKind] = {n: "candidate" if c.dim() == 2 else "query" for n, c in batch.columns.items()}
        check_columns(self.objective.terms, kinds, hard_negatives)
        check_positives(self.objective.terms, 1 + batch.num_extra_positives)
        check_negatives(self.objective.terms, len(batch) * world()[1], hard_negatives, batch.isolated is None)

    def _step(self, model: ULLME, batch: Batch, parameters: list[torch.nn.Parameter]) -> dict[str, float]:
        assert self.optimizer is not None
        started = time.perf_counter()
        self.optimizer.zero_grad()
        half = self.precision == "bf16-mixed"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            logs = self.objective.grad_cache(model, batch, chunk_slices(batch, self.chunk_size, None))
        average_gradients(parameters)
        largest = float("inf") if self.gradient_clip_val is None else self.gradient_clip_val
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        check_finite("the gradient norm", norm, batch)
        self.optimizer.step()
        found = {name: mean_over_ranks(value).item() for name, value in logs.items()}
        tokens = mean_over_ranks(torch.tensor(float(batch.num_tokens), device=norm.device)).item() * world()[1]
        return {**found, "grad_norm": norm.item(), "tokens/s": tokens / (time.perf_counter() - started)}
