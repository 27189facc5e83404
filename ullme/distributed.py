"""Collectives over the ranks of a run; no-ops (the identity) in a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Gradients in one all-reduce: 128 MiB in float32, enough to use a network fully, little beside a model.
BUCKET_ELEMENTS = 2**25


_collectives_off = ContextVar("collectives_off", default=False)


def world() -> tuple[int, int]:
    """(rank, W): this process's number and how many processes there are."""
    if not _collectives_off.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def no_collectives() -> Iterator[None]:
    """Inside, every collective is a no-op, as in a single process: for code that may fail on one rank only."""
    token = _collectives_off.set(True)
    try:
        yield
    finally:
        _collectives_off.reset(token)


def leave_process_group() -> None:
    """Wait for the other ranks, then destroy the process group.

    Gloo's threads release the last collective's tensors a moment after it returns. A process that ends in that moment
    is aborted, since a thread may not enter a Python that shuts down; the barrier's own collective holds no tensor.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_reduce_max(value: int, device: torch.device) -> int:
    """The maximum of ``value`` over ranks."""
    if world()[1] == 1:
        return value
    found = torch.full((), value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether ``value`` is true on any rank. Ranks of a sharded model must agree on every forward, or they hang."""
    return bool(all_reduce_max(int(value), device))


def each_on_any_rank(values: list[bool], device: torch.device) -> list[bool]:
    """:func:`any_rank` of each of several values, as many on every rank, in one collective."""
    if world()[1] == 1 or not values:
        return values
    found = torch.tensor(values, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(value) for value in found.tolist()]


def gather_messages(message: str | None, device: torch.device) -> dict[int, str]:
    """Rank -> its message, the same on every rank; ranks whose message is None are left out."""
    if world()[1] == 1 or not any_rank(message is not None, device):
        return {} if message is None else {0: message}
    messages: list[str | None] = [None] * world()[1]
    dist.all_gather_object(messages, message)
    return {rank: text for rank, text in enumerate(messages) if text is not None}


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """The number of rows on each rank, in the order of ranks."""
    if world()[1] == 1:
        return [size]
    mine = torch.full((1,), size, device=device)
    sizes = [torch.empty_like(mine) for _ in range(world()[1])]
    dist.all_gather(sizes, mine)
    return torch.cat(sizes).tolist()


class _Gather(torch.autograd.Function):
    """Concatenate every rank's rows; backward sums all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        mine = x.new_zeros((longest, *x.shape[1:]))
        mine[: len(x)] = x
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd owns the one it handed over
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[world()[0]], None


def gather(x: Tensor, sizes: list[int] | None = None) -> Tensor:
    """All ranks' rows concatenated, rank 0 first, with gradient.

    With gradients averaged over ranks afterwards (DDP, FSDP), a loss that is the mean over the rank's own queries
    gives exactly the gradient of the mean over the global batch when every rank holds equally many queries;
    :func:`global_mean_weight` corrects the uneven case.

    Args:
        x: (n, ...) this rank's rows.
        sizes: rows of each rank, from :func:`gather_sizes`; asked for if not given.
    """
    if world()[1] == 1:
        return x
    sizes = sizes if sizes is not None else gather_sizes(len(x), x.device)
    if x.is_floating_point():
        return _Gather.apply(x, sizes)
    with torch.no_grad():
        return _Gather.apply(x, sizes)


def global_mean_weight(sizes: list[int]) -> float:
    """The factor of a rank's own mean with which the mean over ranks is the mean over all queries."""
    rank, ranks = world()
    return sizes[rank] * ranks / sum(sizes)


def merge_unit_rows(x: Tensor) -> Tensor:
    """(R, D) unit rows, of which every rank filled in some (a few on several ranks) and left the others zero.

    To the last bit what the first rank that filled a row put there; ``x`` itself is changed.
    """
    rank, ranks = world()
    if ranks == 1:
        return x
    owner = torch.where(x.any(dim=1), rank, ranks)
    dist.all_reduce(owner, dist.ReduceOp.MIN)
    x[owner != rank] = 0
    dist.all_reduce(x)
    return x


def broadcast(parameters: Iterable[Tensor]) -> None:
    """Rank 0's values on every rank."""
    if world()[1] == 1:
        return
    for parameter in parameters:
        dist.broadcast(parameter.detach(), src=0)


def random_seed(device: torch.device) -> Tensor:
    """() int64 on the device, drawn by rank 0 from torch's generator: the same on every rank, without a wait for it."""
    seed = torch.randint(2**62, (), device=device)
    broadcast([seed])
    return seed


def from_rank_zero(make: Callable[[], T]) -> T:
    """What ``make()`` returns on rank 0, which alone calls it; what it raises there, every rank raises."""
    if world()[1] == 1:
        return make()
    sent: list[Any] = [None, None]
    if world()[0] == 0:
        try:
            sent[0] = make()
        except Exception as error:
            dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"])
            raise
    dist.broadcast_object_list(sent)
    if sent[1] is not None:
        raise ValueError(f"rank 0: {sent[1]}")
    return sent[0]


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every ``.grad`` by its mean over ranks, in few large all-reduces.

    A weight that no row of this rank used (an expert of a mixture, for example) counts as a gradient of zero, unless
    no rank used it: then it keeps none.

    Args:
        parameters: weights that every rank holds whole, in the same order everywhere.
    """
    parameters = list(parameters)
    if world()[1] == 1 or not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for bucket in _buckets([p for p, any_used in zip(parameters, used.tolist(), strict=True) if any_used]):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat.div_(world()[1])
        for parameter, gradient, part in zip(
            bucket, gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            parameter.grad = gradient.copy_(part.view_as(gradient))


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of one type, up to :data:`BUCKET_ELEMENTS` together (or one that is larger)."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_ELEMENTS
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of all ranks' elements, which need not be equally many. Without gradient."""
    total = torch.stack([x.detach().sum().double(), torch.full((), x.numel(), dtype=torch.double, device=x.device)])
    if world()[1] > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).to(x.dtype)


def mean_of_each(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks of each of several scalars, which have the same names on every rank. Without gradient.

    One collective for all of them: Lightning's ``sync_dist`` takes two for each value, of which one, a barrier, makes
    the host wait for the GPU.
    """
    if world()[1] == 1 or not values:
        return dict(values)
    means = torch.stack([value.detach().double() for value in values.values()])
    dist.all_reduce(means)
    means.div_(world()[1])
    return {name: mean.to(value.dtype) for (name, value), mean in zip(values.items(), means.unbind(), strict=True)}
