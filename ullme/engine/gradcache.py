"""GradCache (arXiv 2101.06983): the gradient of a whole-batch loss with the memory of one chunk.

1. Embed every microbatch without gradient, keeping the random state it started from.
2. Compute the loss on all representations, and its gradient with respect to them.
3. Embed every microbatch again from its random state, now with gradient, and back-propagate <representation, cached
   gradient>: by the chain rule exactly the parameters' gradient of the loss.

Terms that each query has by itself (generation losses, and the KL between generation and retrieval) come between 2 and
3, a chunk of queries at a time; their gradient with respect to representations is added to the cached one.

A *chunk* is some consecutive queries with all of their candidates. A *microbatch* is the rows (queries or passages, in
any order) that one forward embeds.

Knows PyTorch only: no Lightning, no model class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ullme.batch import Batch, Representations
from ullme.token_rows import TokenRows
from ullme.utils.transfer import to_device

Embed = Callable[[TokenRows], Tensor]


class RandomState:
    """The state of the CPU's generator and of every CUDA generator, as they are now."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def embed_batch(embed: Embed, batch: Batch) -> Representations:
    """All rows of a batch in one forward.

    Args:
        embed: R token rows -> (R, D).
    """
    return _as_representations(embed(batch.embedded), batch)


def _as_representations(reps: Tensor, batch: Batch) -> Representations:
    """(B + B C + B K, D), in the order of ``batch.embedded``."""
    extra = 0 if batch.extra_positives is None else len(batch.extra_positives)
    queries, passages, extra_positives = reps.split([len(batch.queries), len(batch.passages), extra])
    return Representations(
        queries,
        passages.unflatten(0, (len(batch), -1)),
        batch.passage_keys,
        batch.isolated,
        batch.labelled,
        query_keys=batch.query_keys,
        columns=batch.columns,
        extra_positives=extra_positives.unflatten(0, (len(batch), -1)) if extra else None,
        extra_positive_keys=batch.extra_positive_keys,
    )


def chunk_slices(batch: Batch, chunk_size: int | None, chunk_tokens: int | None) -> list[slice]:
    """Consecutive queries, with all their candidates, in chunks.

    Args:
        chunk_size: queries in a chunk, or None.
        chunk_tokens: real tokens in a chunk, or None; a single query with more makes a chunk of its own.
    """
    if chunk_tokens is None:
        size = chunk_size or len(batch)
        return [slice(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
    of_each = [rows.host_lengths.view(len(batch), -1).sum(1) for rows in batch.embedded_parts]
    tokens = torch.stack(of_each).sum(0).tolist()
    chunks, start, total = [], 0, 0
    for n, count in enumerate(tokens):
        if n > start and total + count > chunk_tokens:
            chunks.append(slice(start, n))
            start, total = n, 0
        total += count
    return [*chunks, slice(start, len(batch))]


def chunk_rows(batch: Batch, chunk: slice) -> Tensor:
    """Places of a chunk's queries, passages and extra positives in ``batch.embedded``."""
    places, first = [], 0
    for each in (1, batch.num_candidates, batch.num_extra_positives):
        places.append(torch.arange(chunk.start * each, chunk.stop * each) + first)
        first += len(batch) * each
    return torch.cat(places)


def microbatch_rows(batch: Batch, tokens: int) -> list[Tensor]:
    """All rows that are embedded, the longest first, in microbatches of at most ``tokens`` real tokens (or one row).

    A microbatch may be smaller than a query with its candidates, and rows of like length make attention's work even.

    Returns:
        Places of rows in ``batch.embedded``.
    """
    lengths = batch.embedded_lengths
    order = lengths.argsort(descending=True, stable=True)
    borders, total = [0], 0
    for n, length in enumerate(lengths[order].tolist()):
        if n > borders[-1] and total + length > tokens:
            borders.append(n)
            total = 0
        total += length
    return list(order.tensor_split(borders[1:]))


def count_retained(batch: Batch, microbatches: list[Tensor], tokens: int) -> int:
    """How many of the first microbatches have no more than ``tokens`` real tokens together."""
    if not tokens:
        return 0
    lengths = batch.embedded_lengths
    totals = torch.stack([lengths[rows].sum() for rows in microbatches]).cumsum(0)
    return int(torch.searchsorted(totals, tokens, right=True))


def backward_outside_autocast(backward: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """``backward`` outside of autocast, which would compute in half precision even the gradients of products that the
    forward had computed in float32 (the similarities)."""

    def run(loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            backward(loss)

    return run


class GradCache:
    """One training step's backward.

    Args:
        embed: R token rows -> (R, D), differentiable; None if nothing in the objective looks at representations.
        loss: representations of the whole batch -> the scalar to minimise.
        chunk_loss: a chunk (which queries), its representations (as leaves, or None) and the keyword ``scale`` -> a
            scalar that is summed over chunks, such as a generation loss. ``scale=0.0`` comes with a dummy chunk that
            keeps ranks in step: it adds nothing to the gradient. The loss's own forward happens inside, and its graph
            is freed before anything is embedded again, so the two never need memory at the same time.
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
        self.backward, self.no_sync = backward_outside_autocast(backward), no_sync

    def step(
        self,
        batch: Batch,
        chunks: list[slice],
        microbatches: list[Tensor] | None = None,
        num_retained: int = 0,
        num_dummy_chunks: int = 0,
        num_dummy_microbatches: int = 0,
    ) -> None:
        """Add the gradient of ``loss`` + Σ ``chunk_loss`` to the parameters' ``.grad``.

        Args:
            batch: the whole batch of this rank.
            chunks: consecutive queries, see :func:`chunk_slices`.
            microbatches: rows that are embedded together, see :func:`microbatch_rows`; None: a chunk's queries and
                passages.
            num_retained: the first so many microbatches are embedded once, with gradient, and their graphs are kept
                until phase 3: more memory, less computation.
            num_dummy_chunks: chunks that another rank has more than this one. Ranks of a sharded model must do every
                forward and backward together, so this rank runs one query with ``scale=0.0`` in their place.
            num_dummy_microbatches: likewise, with one row and a gradient of zero.
        """
        if self.embed is None:
            self._chunk_losses(chunks, num_dummy_chunks, None, None)
            return
        microbatches = [chunk_rows(batch, chunk) for chunk in chunks] if microbatches is None else microbatches
        borders = np.cumsum([0, *map(len, microbatches)]).tolist()
        parts = [slice(start, stop) for start, stop in pairwise(borders)]
        order = torch.cat(microbatches).numpy()
        (index,) = to_device([order], batch.row_ids.device)  # one copy for all microbatches
        rows = batch.embedded.select(order, index)
        graphs = [self.embed(rows[part]) for part in parts[:num_retained]]
        found, states = self.embed_without_gradient(
            [*(rows[part] for part in parts[num_retained:]), *[rows[:1]] * num_dummy_microbatches]
        )
        whole = torch.cat([*(graph.detach() for graph in graphs), *found[: len(parts) - num_retained]])
        reps = _as_representations(torch.empty_like(whole).index_copy(0, index, whole), batch)
        gradients = self.cache_gradients(reps)
        self._chunk_losses(chunks, num_dummy_chunks, reps, gradients)
        after = RandomState()
        cached = torch.cat([part.reshape(-1, part.shape[-1]) for part in gradients.embeddings])[index]
        for _ in range(num_dummy_microbatches):
            self.replay(rows[:1], torch.zeros_like(cached[:1]), last=False)
        for n, part in enumerate(parts):
            if n >= num_retained:
                states[n - num_retained].restore()
            last = n == len(parts) - 1
            self.replay(rows[part], cached[part], last, graph=graphs.pop(0) if graphs else None)
        after.restore()

    @torch.no_grad()
    def embed_without_gradient(self, microbatches: Iterable[TokenRows]) -> tuple[list[Tensor], list[RandomState]]:
        """Phase 1: the representations of all microbatches, and the random state in front of each."""
        assert self.embed is not None
        parts, states = [], []
        for rows in microbatches:
            states.append(RandomState())
            parts.append(self.embed(rows))
        # Autocast may keep the half-precision copies of weights that it made here, without gradient, for later use.
        torch.clear_autocast_cache()
        return parts, states

    def cache_gradients(self, reps: Representations) -> Representations:
        """Phase 2: the gradient of ``loss`` with respect to every representation."""
        if self.loss is None:
            return reps.change_embeddings(torch.zeros_like)
        leaves = reps.as_leaves()
        with torch.enable_grad():
            loss = self.loss(leaves)
        with torch.autocast(loss.device.type, enabled=False):
            # a loss may look at the queries only, or at nothing
            found = iter(torch.autograd.grad(loss, leaves.embeddings, materialize_grads=True))
        return leaves.change_embeddings(lambda _: next(found))

    def _chunk_losses(
        self,
        chunks: list[slice],
        num_dummy_chunks: int,
        reps: Representations | None,
        gradients: Representations | None,
    ) -> None:
        """Back-propagate every chunk's own loss; its gradient of the representations is added to ``gradients``."""
        if self.chunk_loss is None:
            return
        for _ in range(num_dummy_chunks):
            self._chunk_loss(slice(0, 1), None if reps is None else reps[:1].as_leaves(), last=False, scale=0.0)
        for n, chunk in enumerate(chunks):
            leaves = None if reps is None else reps[chunk].as_leaves()
            self._chunk_loss(chunk, leaves, last=reps is None and n == len(chunks) - 1)
            if leaves is not None and gradients is not None:
                for total, leaf in zip(gradients.embeddings, leaves.embeddings, strict=True):
                    if leaf.grad is not None:
                        total[chunk].add_(leaf.grad)

    def _chunk_loss(self, chunk: slice, leaves: Representations | None, last: bool, scale: float = 1.0) -> None:
        assert self.chunk_loss is not None
        with nullcontext() if last else self.no_sync():
            self.backward(self.chunk_loss(chunk, leaves, scale=scale))

    def replay(self, rows: TokenRows, gradients: Tensor, last: bool, graph: Tensor | None = None) -> None:
        """Phase 3: back-propagate <representation, cached gradient> of a microbatch.

        Args:
            rows: the R rows of the microbatch.
            gradients: (R, D), the cached gradients of their representations.
            last: whether this backward synchronises gradients over ranks.
            graph: (R, D) representations with their graph, of a retained microbatch; None embeds it again.
        """
        assert self.embed is not None
        with nullcontext() if last else self.no_sync():
            reps = self.embed(rows) if graph is None else graph
            self.backward((reps * gradients).sum())
