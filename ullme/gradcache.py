"""GradCache (arXiv 2101.06983): the gradient of a whole-batch loss with the memory of one chunk.

1. Embed every chunk without gradient, keeping the random state it started from.
2. Compute the loss on all representations, and its gradient with respect to them.
3. Embed every chunk again from its random state, now with gradient, and back-propagate <representation, cached
   gradient>: by the chain rule exactly the parameters' gradient of the loss.

Knows PyTorch only: no Lightning, no model class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ullme.batch import Batch, Representations, TokenRows

Embed = Callable[[TokenRows], Tensor]


class RandomState:
    """The state of the CPU's generator and of every CUDA generator, as they are now."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def embed_batch(embed: Embed, batch: Batch) -> Representations:
    """Queries and passages of a batch in one forward.

    Args:
        embed: R token rows -> (R, D).
    """
    reps = embed(TokenRows.cat([batch.queries, batch.passages]))
    queries, passages = reps.split([len(batch.queries), len(batch.passages)])
    return Representations(queries, passages.unflatten(0, (len(batch), -1)), batch.passage_keys)


def chunk_slices(batch: Batch, chunk_size: int | None, chunk_tokens: int | None) -> list[slice]:
    """Consecutive queries, with all their candidates, in chunks.

    Args:
        chunk_size: queries in a chunk, or None.
        chunk_tokens: real tokens in a chunk, or None; a single query with more makes a chunk of its own.
    """
    if chunk_tokens is None:
        size = chunk_size or len(batch)
        return [slice(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
    passage_tokens = batch.passages.attention_mask.sum(1).view(len(batch), -1).sum(1)
    tokens = (batch.queries.attention_mask.sum(1) + passage_tokens).tolist()
    slices, start, total = [], 0, 0
    for n, count in enumerate(tokens):
        if n > start and total + count > chunk_tokens:
            slices.append(slice(start, n))
            start, total = n, 0
        total += count
    return [*slices, slice(start, len(batch))]


class GradCache:
    """One training step's backward.

    Args:
        embed: R token rows -> (R, D), differentiable.
        loss: representations of the whole batch -> the scalar to minimise.
        backward: what to call on a scalar instead of ``Tensor.backward`` (a strategy's, for example).
        no_sync: context under which a backward does not synchronise gradients over ranks; the last chunk does.
    """

    def __init__(
        self,
        embed: Embed,
        loss: Callable[[Representations], Tensor],
        backward: Callable[[Tensor], None] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.embed, self.loss, self.backward, self.no_sync = embed, loss, backward, no_sync

    def step(self, batch: Batch, slices: list[slice]) -> Tensor:
        """Add the loss's gradient to the parameters' ``.grad``.

        Args:
            batch: the whole batch of this rank.
            slices: the chunks, see :func:`chunk_slices`.

        Returns:
            The detached loss.
        """
        chunks = [batch[s] for s in slices]
        reps, states = self.embed_without_gradient(chunks)
        loss, gradients = self.cache_gradients(reps)
        self.replay(chunks, slices, states, gradients)
        return loss

    @torch.no_grad()
    def embed_without_gradient(self, chunks: Iterable[Batch]) -> tuple[Representations, list[RandomState]]:
        """Phase 1: the representations of all chunks, and the random state in front of each."""
        parts, states = [], []
        for chunk in chunks:
            states.append(RandomState())
            parts.append(embed_batch(self.embed, chunk))
        # Autocast keeps the half-precision copies of weights that it made here, without gradient, for later use.
        torch.clear_autocast_cache()
        reps = Representations(
            torch.cat([part.queries for part in parts]),
            torch.cat([part.passages for part in parts]),
            torch.cat([part.passage_keys for part in parts]),
        )
        return reps, states

    def cache_gradients(self, reps: Representations) -> tuple[Tensor, Representations]:
        """Phase 2: the loss and its gradient with respect to every representation."""
        queries, passages = reps.queries.detach().requires_grad_(), reps.passages.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(Representations(queries, passages, reps.passage_keys))
        grads = torch.autograd.grad(loss, (queries, passages))
        return loss.detach(), Representations(*grads, reps.passage_keys)

    def replay(
        self, chunks: list[Batch], slices: list[slice], states: list[RandomState], gradients: Representations
    ) -> None:
        """Phase 3: every chunk again, from its random state, with gradient."""
        after = RandomState()
        for n, (chunk, part, state) in enumerate(zip(chunks, slices, states, strict=True)):
            last = n == len(chunks) - 1
            with nullcontext() if last else self.no_sync():
                state.restore()
                reps = embed_batch(self.embed, chunk)
                surrogate = (reps.queries * gradients.queries[part]).sum()
                surrogate = surrogate + (reps.passages * gradients.passages[part]).sum()
                self.backward(surrogate)
        after.restore()
