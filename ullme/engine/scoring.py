"""Which likelihoods a step needs, and how they are computed: the same account for the engine and for ``ullme plan``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ullme.batch import PARTS, Batch, LikelihoodKind
from ullme.distributed import all_reduce_max, each_on_any_rank
from ullme.losses.base import ChunkLoss, RepresentationLoss
from ullme.token_rows import TokenRows
from ullme.utils.transfer import to_device

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME


@dataclass(frozen=True)
class Scored:
    """Which candidates have one kind of likelihood computed, each a (B, C) bool mask on the CPU.

    They say which forwards are done, so the host must know them; terms choose candidates on the batch's device.

    Args:
        learned: under the policy, with gradient.
        looked_at: under the policy, without gradient; none of ``learned``.
        statistic: under the policy, without gradient, in a pass of its own before the first chunk.
        reference: under π_ref, without gradient.
    """

    learned: Tensor
    looked_at: Tensor
    statistic: Tensor
    reference: Tensor

    @property
    def policy(self) -> Tensor:
        """(B, C) the policy's, with gradient or without."""
        return self.learned | self.looked_at

    def __getitem__(self, chunk: slice) -> Scored:
        return Scored(self.learned[chunk], self.looked_at[chunk], self.statistic[chunk], self.reference[chunk])


# Kind of likelihood -> the candidates that have it computed.
Scoring = dict[LikelihoodKind, Scored]


def likelihoods_of(
    chunk_terms: Sequence[ChunkLoss], representation_terms: Sequence[RepresentationLoss]
) -> tuple[LikelihoodKind, ...]:
    """The kinds of likelihood that some term looks at."""
    directions = [term.direction for term in chunk_terms if term.uses_generation]
    directions += [term.teacher_direction for term in representation_terms if term.teacher_direction is not None]
    return tuple(dict.fromkeys(kind for direction in directions for kind in PARTS[direction]))


def plan_scoring(
    batch: Batch, chunk_terms: Sequence[ChunkLoss], representation_terms: Sequence[RepresentationLoss]
) -> Scoring:
    """The candidates of a batch whose likelihoods a step on it computes.

    Terms that look at the same likelihood share it: it is computed once, with gradient if any of them learns from it.

    Args:
        batch: of this rank, or a chunk of it.
        chunk_terms: of the objective.
        representation_terms: likewise; those with a teacher look at all candidates under π_ref.
    """
    nothing = torch.zeros_like(batch.passage_keys, dtype=torch.bool)
    masks = {
        kind: {"policy": nothing, "learned": nothing, "statistic": nothing, "reference": nothing}
        for kind in likelihoods_of(chunk_terms, representation_terms)
    }
    for term in chunk_terms:
        if not term.uses_generation:
            continue
        wanted, learned = term.candidates(batch)
        statistic = term.statistic_candidates(batch)
        statistic = nothing if statistic is None else statistic
        for kind in PARTS[term.direction]:
            found = masks[kind]
            if term.uses_policy:
                found["policy"], found["learned"] = found["policy"] | wanted, found["learned"] | learned
                found["statistic"] = found["statistic"] | statistic
            if term.uses_reference:
                found["reference"] = found["reference"] | wanted | statistic
    for reps_term in representation_terms:
        if reps_term.teacher_direction is not None:
            for kind in PARTS[reps_term.teacher_direction]:
                masks[kind]["reference"] = ~nothing
    if not masks:
        return {}
    names = ("learned", "policy", "statistic", "reference")
    whole = torch.stack([found[name] for found in masks.values() for name in names]).cpu()  # one wait for the device
    scoring = {}
    for kind, (learned, policy, statistic, reference) in zip(masks, whole.split(len(names)), strict=True):
        scoring[kind] = Scored(learned, policy & ~learned, statistic, reference)
    return scoring


def embedder(model: ULLME) -> Callable[[TokenRows], Tensor]:
    """R token rows -> (R, D)."""
    return lambda rows: model(rows.input_ids, rows.attention_mask, pool_mask=rows.pool_mask, host=rows.host)["rep"]


def at_least_one(mask: Tensor) -> Tensor:
    """The (b, C) bool mask, with its first candidate added if it is empty: for a forward that only other ranks need."""
    if mask.any():
        return mask
    mask = mask.clone()
    mask[0, 0] = True
    return mask


def score(
    model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool, kind: LikelihoodKind = "passage_given_query"
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of some candidates.

    Args:
        model: whose.
        batch: b queries with their C candidates.
        mask: (b, C) bool, which ones; on the CPU, or the host waits for it.
        share_prompts: run a prompt that several candidates have in common once, where the backbone can be packed.
        kind: log π(p|q), log π(q|p) or log π(p).

    Returns:
        (b, C) in nats, zero elsewhere, and (b, C) the tokens that each is the sum over, one elsewhere.

    Raises:
        ValueError: the batch carries no rows for this kind.
    """
    rows = batch.generation_rows(kind)
    places = np.flatnonzero(mask.cpu().numpy())
    prompt_places, target_places = (places // (mask.numel() // len(part)) for part in (rows.prompts, rows.targets))
    used, owner = np.unique(prompt_places, return_inverse=True)
    flat_places, *indices = to_device([places, used, target_places], rows.prompts.input_ids.device)
    prompts, targets = rows.prompts.select(used, indices[0]), rows.targets.select(target_places, indices[1])
    found = model(
        prompts.input_ids,
        prompts.attention_mask,
        is_generate=True,
        targets=targets,
        owner=owner,
        share_prompts=share_prompts and rows.shares_prompts,
        host=prompts.host,
    )
    flat = found.logps.new_zeros(mask.numel()).index_put((flat_places,), found.logps)
    lengths = found.lengths.new_ones(mask.numel()).index_put((flat_places,), found.lengths)
    return flat.view(mask.shape), lengths.view(mask.shape)


@torch.no_grad()
def score_by_chunk(
    model: ULLME, batch: Batch, mask: Tensor, share_prompts: bool, kind: LikelihoodKind, chunks: Sequence[slice]
) -> Tensor:
    """As :func:`score`, without gradient, in the memory of one chunk.

    Ranks of a sharded model do every forward together: one with fewer chunks, or with nothing to score in a chunk,
    scores a candidate that counts for nothing.

    Returns:
        (B, C) in nats on the batch's device, zero elsewhere.
    """
    device = batch.row_ids.device
    wanted = mask.cpu()
    found: list[Tensor | None] = [None] * len(chunks)
    here = [bool(wanted[chunk].any()) for chunk in chunks]
    here += [False] * (all_reduce_max(len(chunks), device) - len(chunks))
    for n, somewhere in enumerate(each_on_any_rank(here, device)):
        if not somewhere:
            continue
        if here[n]:
            found[n], _ = score(model, batch[chunks[n]], wanted[chunks[n]], share_prompts, kind)
        else:
            score(model, batch[:1], at_least_one(wanted[:1] & False), share_prompts, kind)
    torch.clear_autocast_cache()  # it would keep copies of weights that were made here, without gradient
    dtype = next((part.dtype for part in found if part is not None), torch.float32)
    nothing = torch.zeros(mask.shape, dtype=dtype, device=device)
    return torch.cat([nothing[c] if part is None else part for c, part in zip(chunks, found, strict=True)])
