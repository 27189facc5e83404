"""The weighted sum of terms, and its gradient: all at once, or a chunk at a time with GradCache.

All terms of a chunk share one generation forward and one reference forward. Knows PyTorch only: no Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ullme.batch import Batch, Representations, TokenRows
from ullme.distributed import any_rank, gather_sizes, global_mean_weight, mean_over_ranks, most
from ullme.engine.finite import Health
from ullme.engine.gradcache import GradCache, as_recorded, embed_batch, slice_rows
from ullme.engine.reference import AdaptersOff, Reference
from ullme.losses.base import Chunk, ChunkLoss, RepresentationLoss, Term
from ullme.losses.mntp import MNTP

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

# Queries at once in a pass without gradient over one candidate each, so that memory does not grow with the batch.
STATISTIC_QUERIES = 32

Logs = dict[str, Tensor]
Backward = Callable[[Tensor], None]


class Objective:
    """L = Σ λ · term.

    Args:
        terms: representation losses and chunk losses, each kind once.
        reference: where log π_ref comes from; None takes the LLM with its adapters off.
        share_prompts: run a query's prompt once for all of its candidates, where the backbone can be packed.

    Raises:
        ValueError: no terms, or two of the same name.
    """

    def __init__(self, terms: Sequence[Term], reference: Reference | None = None, share_prompts: bool = True) -> None:
        names = [term.name for term in terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"loss.terms={names}: give at least one term, and each kind once")
        self.terms = list(terms)
        self.reference = reference or AdaptersOff()
        self.share_prompts = share_prompts
        self.representation_terms = [t for t in terms if isinstance(t, RepresentationLoss)]
        self.chunk_terms = [t for t in terms if isinstance(t, ChunkLoss)]
        self.masking = next((t for t in terms if isinstance(t, MNTP)), None)
        self.uses_reference = any(t.uses_reference for t in self.chunk_terms)
        self.uses_reps = bool(self.representation_terms) or any(t.uses_reps for t in self.chunk_terms)

    @property
    def needs_generation(self) -> bool:
        """Whether batches must carry :class:`~ullme.batch.GenerationRows`."""
        return any(term.uses_generation for term in self.chunk_terms)

    def check(self, model: ULLME, num_hard_negatives: int, precision: str = "32-true") -> None:
        """Before training; ``precision`` is what forwards run under.

        Raises:
            ValueError: terms that lack negatives, or a reference that cannot be had.
        """
        for term in self.chunk_terms:
            if isinstance(term, MNTP):
                term.mask_token_id(model.tokenizer)
            if term.needs_negatives and num_hard_negatives < 1:
                raise ValueError(
                    f"loss term {term.name} compares a positive with negatives, and data.num_hard_negatives="
                    f"{num_hard_negatives}; give at least 1"
                )
        if self.uses_reference:
            self.reference.prepare(model, precision)

    def full_batch(self, model: ULLME, batch: Batch, backward: Backward = Tensor.backward) -> Logs:
        """The gradient in one forward and one backward; returns the loss, every term and the metrics, detached."""
        logs: Logs = {}
        health = Health()
        reps = embed_batch(embedder(model), batch) if self.uses_reps else None
        parts = [self._representation_loss(batch, logs, health)(reps)] if self.representation_terms and reps else []
        if self.chunk_terms:
            parts.append(self._chunk_loss(model, batch, logs, health)(batch, reps))
        as_recorded(backward)(torch.stack(parts).sum())
        health.speak(batch.row_ids.device)
        return self._total(logs)

    def grad_cache(
        self,
        model: ULLME,
        batch: Batch,
        slices: list[slice],
        backward: Backward = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
        pieces: list[Tensor] | None = None,
        held: int = 0,
    ) -> Logs:
        """As :meth:`full_batch`, in the memory of one chunk; ``slices``, ``pieces`` and ``held``: see
        :meth:`ullme.engine.gradcache.GradCache.step`."""
        logs: Logs = {}
        health = Health()
        engine = GradCache(
            embed=embedder(model) if self.uses_reps else None,
            loss=self._representation_loss(batch, logs, health) if self.representation_terms else None,
            chunk_loss=self._chunk_loss(model, batch, logs, health) if self.chunk_terms else None,
            backward=backward,
            no_sync=no_sync,
        )
        pieces = [slice_rows(batch, part) for part in slices] if pieces is None else pieces
        idle, idle_pieces = (most(len(x), batch.row_ids.device) - len(x) for x in (slices, pieces))
        engine.step(batch, slices, pieces, held, idle=idle, idle_pieces=idle_pieces)
        health.speak(batch.row_ids.device)
        return self._total(logs)

    def _total(self, logs: Logs) -> Logs:
        loss = torch.stack([term.weight * logs[term.name].double() for term in self.terms]).sum()
        weights = {f"weight/{term.name}": torch.tensor(term.weight) for term in self.terms}
        return {"loss": loss, **logs, **weights}

    def _representation_loss(self, batch: Batch, logs: Logs, health: Health) -> Callable[[Representations], Tensor]:
        def total(reps: Representations) -> Tensor:
            values = []
            reps = replace(reps, isolated=batch.isolated)
            for term in self.representation_terms:
                value = term(reps)
                health.check(term.name, value, batch, reps)
                logs[term.name] = value.detach()
                values.append(term.weight * value)
            return torch.stack(values).sum()

        return total

    def _chunk_loss(self, model: ULLME, batch: Batch, logs: Logs, health: Health) -> Callable[..., Tensor]:
        """Chunk, representations and 0.0 if it shall not count -> its part of the mean over the global batch."""
        sizes = gather_sizes(len(batch), batch.row_ids.device)
        weight = global_mean_weight(sizes) / len(batch)
        statistics = self._statistics(model, batch)

        def total(part: Batch, reps: Representations | None, share: float = 1.0) -> Tensor:
            scale = weight * share
            chunk = self._chunk(model, part, reps, statistics)
            values, seen = [], set()
            for term in self.chunk_terms:
                value = term(chunk)
                health.check(term.name, value, part)
                _add(logs, term.name, value, scale)
                for name, metric in ({} if health.problems else term.metrics(chunk)).items():
                    _add(logs, f"{term.name}/{name}" if name in seen else name, metric, scale)
                    seen.add(name)
                values.append(term.weight * value)
            return torch.stack(values).sum() * scale

        return total

    def _chunk(self, model: ULLME, part: Batch, reps: Representations | None, statistics: dict[str, Tensor]) -> Chunk:
        masks = [term.candidates(part) for term in self.chunk_terms]
        wanted = torch.stack([w for w, _ in masks]).any(0)
        learned = torch.stack([g for _, g in masks]).any(0)
        logps, lengths = self._policy(model, part, wanted, learned)
        reference = None
        if self.uses_reference:
            needed = [w for term, (w, _) in zip(self.chunk_terms, masks, strict=True) if term.uses_reference]
            reference = self.reference.logps(model, part, torch.stack(needed).any(0), self.share_prompts)
        masked = _masked_logps(model, part, self.masking) if self.masking is not None else None
        return Chunk(reps, logps, reference, lengths, part.row_ids, part.passage_keys, statistics, masked)

    def _policy(self, model: ULLME, part: Batch, wanted: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C) log-likelihoods and token counts. Only candidates that some term learns from go through backward."""
        logps = torch.zeros(wanted.shape, device=wanted.device)
        lengths = torch.ones(wanted.shape, dtype=torch.long, device=wanted.device)
        for mask, grad in ((learned, True), (wanted & ~learned, False)):
            if any_rank(bool(mask.any()), mask.device):
                with torch.set_grad_enabled(grad):
                    scored, counts = score(model, part, at_least_one(mask), self.share_prompts)
                logps = torch.where(mask, scored, logps.to(scored.dtype))
                lengths = torch.where(mask, counts, lengths)
        return logps, lengths

    @torch.no_grad()
    def _statistics(self, model: ULLME, batch: Batch) -> dict[str, Tensor]:
        """Means over the global batch that a term must know before its gradient."""
        found = {}
        for term in self.chunk_terms:
            values = []
            rounds = most(-(-len(batch) // STATISTIC_QUERIES), batch.row_ids.device)
            for start in range(0, rounds * STATISTIC_QUERIES, STATISTIC_QUERIES):
                part = batch[start : start + STATISTIC_QUERIES] if start < len(batch) else batch[:1]
                mask = term.statistic_candidates(part)
                if mask is None:
                    break
                logps, lengths = score(model, part, mask, self.share_prompts)
                reference = self.reference.logps(model, part, mask, self.share_prompts) if term.uses_reference else None
                chunk = Chunk(None, logps, reference, lengths, part.row_ids, part.passage_keys, {})
                values.append(term.statistic(chunk) if start < len(batch) else logps.new_zeros(0))
            if values:
                found[term.name] = mean_over_ranks(torch.cat(values))
        torch.clear_autocast_cache()
        return found


def embedder(model: ULLME) -> Callable[[TokenRows], Tensor]:
    """R token rows -> (R, D)."""
    return lambda rows: model(rows.input_ids, rows.attention_mask, pool_mask=rows.pool_mask)["rep"]


def _masked_logps(model: ULLME, batch: Batch, masking: MNTP) -> Tensor:
    """(b,) mean log-probability of the tokens that are masked in each query, in nats; 0 where none can be."""
    rows, masked = masking.mask(batch.queries, model.tokenizer)
    found = model(rows.input_ids, rows.attention_mask, masked=masked)
    return found.logps / found.lengths.clamp(min=1)


def at_least_one(mask: Tensor) -> Tensor:
    """``mask``, or with its first place where it is empty: for a forward that only other ranks need."""
    if mask.any():
        return mask
    mask = mask.clone()
    mask[0, 0] = True
    return mask


def score(model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of some candidates.

    Args:
        mask: (b, C) bool, which ones.

    Returns:
        (b, C) log π(p|q) in nats, zero elsewhere, and (b, C) token counts, one elsewhere.

    Raises:
        ValueError: the batch carries no generation rows.
    """
    if batch.generation is None:
        raise ValueError(
            "the loss has generation terms, but the batches carry no generation rows; "
            "make the loader with train_dataloader_for(..., generation=True)"
        )
    prompts, targets = batch.generation.prompts, batch.generation.targets
    places = mask.flatten().nonzero()[:, 0]
    owners = places // mask.shape[1]
    used, owner = owners.unique(return_inverse=True)
    found = model(
        prompts.input_ids[used],
        prompts.attention_mask[used],
        is_generate=True,
        targets=TokenRows(targets.input_ids[places], targets.attention_mask[places]),
        owner=owner,
        share_prompts=share_prompts,
    )
    flat = found.logps.new_zeros(mask.numel()).index_put((places,), found.logps)
    lengths = torch.ones(mask.numel(), dtype=torch.long, device=mask.device).index_put((places,), found.lengths)
    return flat.view(mask.shape), lengths.view(mask.shape)


def _add(logs: Logs, name: str, value: Tensor, scale: float) -> None:
    logs[name] = logs.get(name, torch.zeros((), device=value.device)) + value.detach().sum() * scale
