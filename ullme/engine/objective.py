"""The weighted sum of terms, and its gradient: all at once, or a chunk at a time with GradCache.

All terms of a chunk share one generation forward for each kind of likelihood; what they need of the reference is
computed for the whole batch before. Knows PyTorch only: no Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ullme.batch import PARTS, Batch, Direction, LikelihoodKind, Representations
from ullme.distributed import (
    all_reduce_max,
    each_on_any_rank,
    gather_sizes,
    global_mean_weight,
    mean_over_ranks,
    random_seed,
    world,
)
from ullme.engine.finite import FiniteChecks
from ullme.engine.gradcache import GradCache, backward_outside_autocast, chunk_rows, embed_batch
from ullme.engine.mismatched import mismatched_pairs
from ullme.engine.reference import AdaptersOff, Reference, embed_with_adapters_off
from ullme.engine.scoring import (
    Scored,
    Scoring,
    at_least_one,
    embedder,
    likelihoods_of,
    plan_scoring,
    score,
    score_by_chunk,
)
from ullme.losses.base import Chunk, ChunkLoss, RepresentationLoss, Term
from ullme.losses.mntp import MNTP

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME
    from ullme.token_rows import TokenRows

# Queries at once in a pass without gradient over one candidate each, so that memory does not grow with the batch.
STATISTIC_QUERIES = 32

Logs = dict[str, Tensor]
References = dict[LikelihoodKind, Tensor]
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
        self._parts: dict[tuple[str, ...], Objective] = {}
        self.representation_terms = [t for t in terms if isinstance(t, RepresentationLoss)]
        self.chunk_terms = [t for t in terms if isinstance(t, ChunkLoss)]
        self.masking = next((t for t in terms if isinstance(t, MNTP)), None)
        # The kinds of likelihood that terms look at (batches must carry rows for them), and under which model.
        self.likelihoods = likelihoods_of(self.chunk_terms, self.representation_terms)
        self.policy_likelihoods = likelihoods_of([t for t in self.chunk_terms if t.uses_policy], [])
        self.reference_likelihoods = likelihoods_of(
            [t for t in self.chunk_terms if t.uses_reference], self.representation_terms
        )
        self.uses_reference = bool(self.reference_likelihoods)
        self.uses_guide = any(t.uses_guide for t in self.representation_terms)
        self.uses_reps = bool(self.representation_terms) or any(t.uses_reps for t in self.chunk_terms)

    def of_terms(self, names: Collection[str] | None) -> Objective:
        """The objective with the terms of these names alone; None: with all.

        Raises:
            ValueError: there is no such term.
        """
        if names is None or set(names) == {term.name for term in self.terms}:
            return self
        if tuple(names) not in self._parts:
            known = [term.name for term in self.terms]
            if unknown := [name for name in names if name not in known]:
                raise ValueError(
                    f"data.datasets: terms={list(names)}: loss.terms has no term {' and '.join(map(repr, unknown))}; "
                    f"it has {', '.join(known)}"
                )
            terms = [term for term in self.terms if term.name in names]
            self._parts[tuple(names)] = Objective(terms, self.reference, self.share_prompts)
        return self._parts[tuple(names)]

    @property
    def matryoshka_dims(self) -> tuple[int, ...]:
        """The numbers of leading dimensions that are trained as embeddings, the largest first; empty for none."""
        return tuple(sorted({dim for term in self.representation_terms for dim in term.matryoshka_dims}, reverse=True))

    @property
    def needs_generation(self) -> bool:
        """Whether batches must carry :class:`~ullme.batch.GenerationRows`."""
        return bool(self.likelihoods)

    @property
    def runs_generation(self) -> bool:
        """Whether a step runs the policy over generation rows, with the activations that this takes."""
        return bool(self.policy_likelihoods)

    def scoring(self, batch: Batch) -> Scoring:
        """The candidates whose likelihoods a step on this batch computes, by kind of likelihood."""
        part = self.of_terms(batch.terms)
        return plan_scoring(batch, part.chunk_terms, part.representation_terms)

    def check(self, model: ULLME, num_hard_negatives: int, precision: str = "32-true", labelled: bool = True) -> None:
        """Before training.

        Args:
            model: the policy.
            num_hard_negatives: N.
            precision: what forwards run under.
            labelled: whether the data says which candidate is a positive.

        Raises:
            ValueError: terms that lack negatives or a positive or all have weight 0, or a reference that cannot be had.
        """
        self.check_rows(num_hard_negatives, labelled)
        self.check_model(model, precision)

    def check_rows(self, num_hard_negatives: int, labelled: bool = True, where: str = "") -> None:
        """What :meth:`check` checks of the training rows; ``where`` names their dataset.

        Raises:
            ValueError: terms that lack negatives or a positive, or that all have weight 0.
        """
        if not any(term.weight for term in self.terms):
            names = " and ".join(term.name for term in self.terms)
            raise ValueError(
                f"loss.terms: with {names} of weight 0 a step{where} trains nothing; give one a weight above 0, or "
                "leave the rows out"
            )
        if not labelled:
            self._check_without_labels(where)
        for term in self.terms:
            if term.compares_candidates(labelled) and num_hard_negatives < 1:
                compared = "a positive with negatives" if term.needs_positive else "a query's candidates"
                raise ValueError(
                    f"loss term {term.name} compares {compared}, and data.num_hard_negatives="
                    f"{num_hard_negatives}{where}; give at least 1"
                )

    def check_model(self, model: ULLME, precision: str = "32-true") -> None:
        """What :meth:`check` checks of the model.

        Raises:
            ValueError: embeddings of another width than a term needs, no mask token, or a reference or guide that this
                model does not have.
        """
        for term in self.representation_terms:
            term.check_width(model.hidden_size)
        if self.masking is not None:
            self.masking.mask_token_id(model.tokenizer)
        if self.uses_guide and model.options.lora_name is None:
            raise ValueError(
                "InfoNCE.false_negatives.scores=guide, but lora_name=null trains the LLM itself, so there are no "
                "adapters to switch off; take scores=student, or a teacher's scores in a column (scores=column)"
            )
        if self.uses_reference:
            self.reference.prepare(model, precision, self.reference_likelihoods)

    def _check_without_labels(self, where: str) -> None:
        """Raises: ValueError: a term needs a positive."""
        if needy := [term.name for term in self.terms if term.needs_positive]:
            raise ValueError(
                f"loss term {' and '.join(needy)} needs to know each query's positive, and rows of query and "
                f"candidates{where} have none, nor have pairs with a score; train with KL (teacher: reference, "
                "direction: query_given_passage) and PseudoLabelInfoNCE, as configs/recipes/art.yaml does, with CoSENT "
                "on pairs, or give rows with positives"
            )

    def full_batch(self, model: ULLME, batch: Batch, backward: Backward = Tensor.backward) -> Logs:
        """The gradient in one forward and one backward; returns the loss, every term and the metrics, detached.

        Of a batch whose dataset names its terms, only those.
        """
        if (part := self.of_terms(batch.terms)) is not self:
            return part.full_batch(model, batch, backward)
        logs: Logs = {}
        finite = FiniteChecks()
        whole = slice(0, len(batch))
        scoring = self.scoring(batch)
        references = self._references(model, batch, scoring, [whole])
        chunk_loss = None
        if self.chunk_terms:  # made before dropout draws numbers, as in grad_cache
            chunk_loss = self._chunk_loss(model, batch, scoring, references, logs, finite, [whole])
        reps = embed_batch(embedder(model), batch) if self.uses_reps else None
        parts = []
        if self.representation_terms and reps:
            guide = self._guide(model, batch, [whole])
            parts.append(self._representation_loss(batch, references, guide, logs, finite)(reps))
        if chunk_loss is not None:
            parts.append(chunk_loss(whole, reps))
        backward_outside_autocast(backward)(torch.stack(parts).sum())
        finite.raise_if_any(batch.row_ids.device)
        return self._total(logs)

    def grad_cache(
        self,
        model: ULLME,
        batch: Batch,
        chunks: list[slice],
        backward: Backward = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
        microbatches: list[Tensor] | None = None,
        num_retained: int = 0,
    ) -> Logs:
        """As :meth:`full_batch`, in the memory of one chunk; ``chunks``, ``microbatches`` and ``num_retained``: see
        :meth:`ullme.engine.gradcache.GradCache.step`."""
        if (part := self.of_terms(batch.terms)) is not self:
            return part.grad_cache(model, batch, chunks, backward, no_sync, microbatches, num_retained)
        logs: Logs = {}
        finite = FiniteChecks()
        scoring = self.scoring(batch)
        references = self._references(model, batch, scoring, chunks)
        chunk_loss = loss = None
        microbatches = [chunk_rows(batch, chunk) for chunk in chunks] if microbatches is None else microbatches
        dummy_chunks, dummy_microbatches = (
            all_reduce_max(len(parts), batch.row_ids.device) - len(parts) for parts in (chunks, microbatches)
        )
        if self.chunk_terms:
            in_order = [*[slice(0, 0)] * dummy_chunks, *chunks]  # as GradCache goes through them
            chunk_loss = self._chunk_loss(model, batch, scoring, references, logs, finite, in_order)
        if self.representation_terms:
            loss = self._representation_loss(batch, references, self._guide(model, batch, chunks), logs, finite)
        engine = GradCache(
            embed=embedder(model) if self.uses_reps else None,
            loss=loss,
            chunk_loss=chunk_loss,
            backward=backward,
            no_sync=no_sync,
        )
        engine.step(batch, chunks, microbatches, num_retained, dummy_chunks, dummy_microbatches)
        finite.raise_if_any(batch.row_ids.device)
        return self._total(logs)

    def _total(self, logs: Logs) -> Logs:
        loss = torch.stack([term.weight * logs[term.name].double() for term in self.terms]).sum()
        weights = {f"weight/{term.name}": torch.full((), term.weight, device=loss.device) for term in self.terms}
        return {"loss": loss, **logs, **weights}

    def _representation_loss(
        self,
        batch: Batch,
        references: References,
        guide: Representations | None,
        logs: Logs,
        finite: FiniteChecks,
    ) -> Callable[[Representations], Tensor]:
        def total(reps: Representations) -> Tensor:
            values = []
            if guide is not None:
                reps = replace(
                    reps,
                    guide_queries=guide.queries,
                    guide_passages=guide.passages,
                    guide_extra_positives=guide.extra_positives,
                )
            for term in self.representation_terms:
                direction = term.teacher_direction
                teacher = None if direction is None else _per_token(batch, references, direction)
                if teacher is not None:  # NaN passes no margin, and would only leave its query out
                    finite.check(f"the teacher of {term.name}", teacher.sum(1), batch)
                seen = replace(reps, teacher=teacher)
                value = term(seen)
                finite.check(term.name, value, batch, reps)
                logs[term.name] = value.detach()
                for name, metric in term.metrics(seen).items():
                    logs[name] = metric.detach()
                values.append(term.weight * value)
            return torch.stack(values).sum()

        return total

    def _guide(self, model: ULLME, batch: Batch, chunks: Sequence[slice]) -> Representations | None:
        """Embeddings by the LLM with its adapters off, where a term asks for them."""
        return embed_with_adapters_off(model, batch, chunks) if self.uses_guide else None

    def _chunk_loss(
        self,
        model: ULLME,
        batch: Batch,
        scoring: Scoring,
        references: References,
        logs: Logs,
        finite: FiniteChecks,
        chunks: Sequence[slice],
    ) -> Callable[..., Tensor]:
        """(chunk, representations, scale) -> the chunk's part of the mean over the global batch, times ``scale``.

        Args:
            chunks: in the order in which they will be asked for, empty ones in place of dummies.
        """
        forwards = self._forwards(scoring, chunks, batch.row_ids.device)
        sizes = gather_sizes(len(batch), batch.row_ids.device)
        weight = global_mean_weight(sizes) / len(batch)
        masked_queries = None if self.masking is None else _mask_queries(model, batch, self.masking, sizes)
        statistics = self._statistics(model, batch, scoring, references, sizes)

        def total(chunk: slice, reps: Representations | None, scale: float = 1.0) -> Tensor:
            part, scale = batch[chunk], weight * scale
            policy = {
                kind: self._policy(model, part, kind, scored[chunk], forwards) for kind, scored in scoring.items()
            }
            masked = None if masked_queries is None else _masked_logps(model, *masked_queries, chunk)
            reference = {kind: logps[chunk] for kind, logps in references.items()}
            values, seen = [], set()
            for term in self.chunk_terms:
                seen_by_term = _chunk(part, term.direction, reps, policy, reference, statistics, masked)
                value = term(seen_by_term)
                finite.check(term.name, value, part)
                _add(logs, term.name, value, scale)
                for name, metric in term.metrics(seen_by_term).items():
                    name = f"{term.name}/{name}" if name in seen else name  # noqa: PLW2901
                    _add(logs, name, metric, scale)
                    seen.add(name)
                values.append(term.weight * value)
            return torch.stack(values).sum() * scale

        return total

    def _forwards(self, scoring: Scoring, chunks: Sequence[slice], device: torch.device) -> Iterator[bool]:
        """Whether some rank needs each forward of :meth:`_policy`, in the order in which these are done."""
        kinds = [kind for kind in scoring if kind in self.policy_likelihoods]
        needed = [
            bool(m.any()) for c in chunks for k in kinds for m in (scoring[k][c].learned, scoring[k][c].looked_at)
        ]
        return iter(each_on_any_rank(needed, device))

    def _policy(
        self, model: ULLME, part: Batch, kind: LikelihoodKind, scored: Scored, forwards: Iterator[bool]
    ) -> Tensor:
        """(b, C) log-likelihoods. Only candidates that some term learns from go through backward."""
        logps = torch.zeros(part.passage_keys.shape, device=part.passage_keys.device)
        if kind not in self.policy_likelihoods:
            return logps
        for mask, grad in ((scored.learned, True), (scored.looked_at, False)):
            if not next(forwards):
                continue
            with torch.set_grad_enabled(grad):
                found, _ = score(model, part, at_least_one(mask), self.share_prompts, kind)
            # zero where this mask has nothing, and the masks have nothing in common
            logps = logps + (found if mask.any() else torch.where(torch.zeros_like(found, dtype=torch.bool), found, 0))
        return logps

    def _references(self, model: ULLME, batch: Batch, scoring: Scoring, chunks: Sequence[slice]) -> References:
        """Kind of likelihood -> (B, C) under π_ref, zero where no term asks for it: one pass over the batch."""
        return {
            kind: self.reference.logps(model, batch, scoring[kind].reference, self.share_prompts, kind, chunks)
            for kind in self.reference_likelihoods
        }

    @torch.no_grad()
    def _statistics(
        self, model: ULLME, batch: Batch, scoring: Scoring, references: References, sizes: list[int]
    ) -> dict[str, Tensor]:
        """Means over the global batch that a term must know before its gradient; ``sizes``: queries of each rank."""
        chunks = [slice(n, min(n + STATISTIC_QUERIES, len(batch))) for n in range(0, len(batch), STATISTIC_QUERIES)]
        found = {}
        for term in self.chunk_terms:
            kinds = PARTS[term.direction]
            if term.statistic_of_mismatched_pairs:
                if sum(sizes) == 1:
                    found[term.name] = torch.zeros((), device=batch.row_ids.device)
                    continue
                pairs = mismatched_pairs(batch, kinds)
                every = torch.ones(
                    pairs.passage_keys.shape, dtype=torch.bool
                )  # on the host, as all masks of candidates
                masks = dict.fromkeys(kinds, every)
                under_reference = {
                    kind: self.reference.logps(model, pairs, every, self.share_prompts, kind, chunks) for kind in kinds
                }
            elif term.statistic_candidates(batch[:1]) is not None:
                pairs, under_reference = batch, references
                masks = {kind: scoring[kind].statistic for kind in kinds}
            else:
                continue
            policy = {
                kind: score_by_chunk(model, pairs, mask, self.share_prompts, kind, chunks)
                for kind, mask in masks.items()
            }
            values = term.statistic(_chunk(pairs, term.direction, None, policy, under_reference, {}, None))
            found[term.name] = mean_over_ranks(values)
        return found


def _chunk(
    part: Batch,
    direction: Direction,
    reps: Representations | None,
    policy: dict[LikelihoodKind, Tensor],
    references: References,
    statistics: dict[str, Tensor],
    masked: Tensor | None,
) -> Chunk:
    """What a term sees of some queries: the likelihoods of its direction."""
    shape = part.passage_keys.shape
    kinds = PARTS[direction]
    known = [kind for kind in kinds if kind in policy]
    logps = _combine(direction, policy) if known else torch.zeros(shape, device=part.row_ids.device)
    lengths = part.generation_rows(known[0]).lengths(shape) if known else torch.ones_like(part.passage_keys)
    return Chunk(
        part,
        reps,
        logps,
        _combine(direction, references) if all(kind in references for kind in kinds) else None,
        lengths,
        statistics,
        masked,
    )


def _combine(direction: Direction, logps: Mapping[LikelihoodKind, Tensor]) -> Tensor:
    """(b, C) log-likelihoods of a direction, from those that it is a sum of."""
    return torch.stack([sign * logps[kind] for kind, sign in PARTS[direction].items()]).sum(0)


def _per_token(batch: Batch, references: References, direction: Direction) -> Tensor:
    """(B, C) log-likelihoods under π_ref in nats a token."""
    kind = next(iter(PARTS[direction]))
    return _combine(direction, references) / batch.generation_rows(kind).lengths(batch.passage_keys.shape)


def _mask_queries(model: ULLME, batch: Batch, masking: MNTP, sizes: list[int]) -> tuple[TokenRows, Tensor]:
    """:meth:`MNTP.mask` of all queries, before they are cut into chunks; ``sizes``: queries of each rank."""
    seed = random_seed(batch.row_ids.device)
    return masking.mask(batch.queries, model.tokenizer, seed, first_row=sum(sizes[: world()[0]]))


def _masked_logps(model: ULLME, rows: TokenRows, masked: Tensor, chunk: slice) -> Tensor:
    """(b,) mean log-probability of the masked tokens of each of a chunk's queries, in nats; 0 where none can be."""
    part = rows[chunk]
    found = model(part.input_ids, part.attention_mask, masked=masked[chunk], host=part.host)
    return found.logps / found.lengths.clamp(min=1)


def _add(logs: Logs, name: str, value: Tensor, scale: float) -> None:
    logs[name] = logs.get(name, torch.zeros((), device=value.device)) + value.detach().sum() * scale
