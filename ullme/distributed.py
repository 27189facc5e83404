"""What ranks tell each other. Everything here is the identity in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, W)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave() -> None:
    """Wait for the other ranks, then leave the process group.

    Gloo's threads let go of the last collective's tensors a moment after it returns. A process that ends in that moment
    is aborted, since a thread may not enter a Python that shuts down; the barrier's own collective holds no tensor.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """The number of rows on each rank."""
    if world()[1] == 1:
        return [size]
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(world()[1])]
    dist.all_gather(sizes, mine)
    return [int(s) for s in sizes]


class _Gather(torch.autograd.Function):
    """Concatenate every rank's rows; backward sums what all ranks' losses say about this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int]) -> Tensor:  # noqa: ANN001
        ctx.sizes = sizes
        longest = max(sizes)
        mine = x.new_zeros((longest, *x.shape[1:]))
        mine[: len(x)] = x
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: ANN001
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd owns the one it handed over
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[world()[0]], None


def gather(x: Tensor, sizes: list[int] | None = None) -> Tensor:
    """All ranks' rows behind one another, rank 0 first, with gradient.

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
    """What a rank's own mean is to be multiplied with, so that the mean over ranks is the mean over all queries."""
    rank, ranks = world()
    return sizes[rank] * ranks / sum(sizes)


def merge_unit_rows(x: Tensor) -> Tensor:
    """(R, D) unit rows, of which every rank filled in some (a few on several ranks) and left the others zero."""
    if world()[1] == 1:
        return x
    dist.all_reduce(x)
    return torch.nn.functional.normalize(x, dim=-1)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of all ranks' elements, which need not be equally many. Without gradient."""
    total = torch.stack([x.detach().sum().double(), torch.tensor(float(x.numel()), device=x.device).double()])
    if world()[1] > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).to(x.dtype)
