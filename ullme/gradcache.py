"""GradCache (arXiv 2101.06983): the gradient of a whole-batch loss with the memory of one chunk.

1. Embed every chunk without gradient, keeping the random state it started from.
2. Compute the loss on all representations, and its gradient with respect to them.
3. Embed every chunk again from its random state, now with gradient, and back-propagate <representation, cached
   gradient>: by the chain rule exactly the parameters' gradient of the loss.

Terms that each query has by itself (generation losses, and the KL between generation and retrieval) are computed in
phase 3, a chunk at a time; what they say about representations is added to the cached gradient.

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
        embed: R token rows -> (R, D), differentiable; None if nothing in the objective looks at representations.
        loss: representations of the whole batch -> the scalar to minimise.
        chunk_loss: a chunk and its representations (as leaves, or None) -> a scalar that is summed over chunks, such
            as a generation loss; a third argument of 0.0 marks a chunk that shall not count. Its own forward happens
            inside, and its graph is freed before the chunk is embedded again, so the two never need memory at the
            same time.
        backward: what to call on a scalar instead of ``Tensor.backward`` (a strategy's, for example).
        no_sync: context under which a backward does not synchronise gradients over ranks; the last backward does.
    """

    def __init__(
        self,
        embed: Embed | None,
        loss: Callable[[Representations], Tensor] | None,
        chunk_loss: Callable[..., Tensor] | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.embed, self.loss, self.chunk_loss = embed, loss, chunk_loss
        self.backward, self.no_sync = backward, no_sync

    def step(self, batch: Batch, slices: list[slice], held: int = 0, idle: int = 0) -> None:
        """Add the gradient of ``loss`` + Σ ``chunk_loss`` to the parameters' ``.grad``.

        Args:
            batch: the whole batch of this rank.
            slices: the chunks, see :func:`chunk_slices`.
            held: the first so many chunks are embedded once, with gradient, and their graphs held until phase 3:
                memory for speed.
            idle: chunks that other ranks have more than this one. A sharded model's ranks do every forward and
                backward together, so this rank goes along with one query that counts for nothing.
        """
        chunks = [batch[s] for s in slices]
        if self.embed is None:
            for _ in range(idle):
                self._add_chunk_loss(batch[:1], None, last=False, share=0.0)
            for n, chunk in enumerate(chunks):
                self._add_chunk_loss(chunk, None, last=n == len(chunks) - 1)
            return
        graphs = [embed_batch(self.embed, chunk) for chunk in chunks[:held]]
        parts, states = self.embed_without_gradient([*chunks[held:], *[batch[:1]] * idle])
        reps = Representations.cat([*(graph.detach() for graph in graphs), *parts])[: len(batch)]
        gradients = self.cache_gradients(reps)
        after = RandomState()
        nothing = Representations(torch.zeros_like(reps.queries), torch.zeros_like(reps.passages), reps.passage_keys)
        for _ in range(idle):
            if self.chunk_loss is not None:
                self._add_chunk_loss(batch[:1], reps[:1], last=False, share=0.0)
            self.replay(batch[:1], nothing[:1], last=False)
        for n, (chunk, part) in enumerate(zip(chunks, slices, strict=True)):
            last = n == len(chunks) - 1
            if self.chunk_loss is not None:
                after.restore()
                self._add_chunk_loss(chunk, reps[part], last=False, gradients=gradients[part])
                after = RandomState()
            if graphs:
                with nullcontext() if last else self.no_sync():
                    self._pull(graphs.pop(0), gradients[part])
            else:
                states[n - held].restore()
                self.replay(chunk, gradients[part], last)
        after.restore()

    @torch.no_grad()
    def embed_without_gradient(self, chunks: Iterable[Batch]) -> tuple[list[Representations], list[RandomState]]:
        """Phase 1: the representations of all chunks, and the random state in front of each."""
        assert self.embed is not None
        parts, states = [], []
        for chunk in chunks:
            states.append(RandomState())
            parts.append(embed_batch(self.embed, chunk))
        # Autocast may keep the half-precision copies of weights that it made here, without gradient, for later use.
        torch.clear_autocast_cache()
        return parts, states

    def cache_gradients(self, reps: Representations) -> Representations:
        """Phase 2: the gradient of ``loss`` with respect to every representation."""
        if self.loss is None:
            zeros = torch.zeros_like(reps.queries), torch.zeros_like(reps.passages)
            return Representations(*zeros, reps.passage_keys)
        leaves = reps.as_leaves()
        with torch.enable_grad():
            loss = self.loss(leaves)
        return Representations(*torch.autograd.grad(loss, (leaves.queries, leaves.passages)), reps.passage_keys)

    def _add_chunk_loss(
        self,
        chunk: Batch,
        reps: Representations | None,
        last: bool,
        gradients: Representations | None = None,
        share: float = 1.0,
    ) -> None:
        """Back-propagate a chunk's own loss; what it says about the representations is added to ``gradients``."""
        assert self.chunk_loss is not None
        leaves = None if reps is None else reps.as_leaves()
        with nullcontext() if last else self.no_sync():
            self.backward(self.chunk_loss(chunk, leaves, share))
        if leaves is not None and gradients is not None and leaves.queries.grad is not None:
            gradients.queries.add_(leaves.queries.grad)
            gradients.passages.add_(leaves.passages.grad)

    def replay(self, chunk: Batch, gradients: Representations, last: bool) -> None:
        """Phase 3: a chunk again, with gradient."""
        assert self.embed is not None
        with nullcontext() if last else self.no_sync():
            self._pull(embed_batch(self.embed, chunk), gradients)

    def _pull(self, reps: Representations, gradients: Representations) -> None:
        """Back-propagate the cached gradients through a chunk's graph."""
        surrogate = (reps.queries * gradients.queries).sum() + (reps.passages * gradients.passages).sum()
        self.backward(surrogate)
