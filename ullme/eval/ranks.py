"""Evaluation over several processes (``torchrun --nproc-per-node N evaluate.py ...``).

Only the first process runs mteb: it loads the tasks, computes the scores, writes the results and prints them. The
others load the model and embed their share of the texts. Batches are formed as in a single process and assigned to the
ranks one by one, so every embedding, and every score, equals the single process's to the last bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ullme.distributed import world
from ullme.models.encoding import embed_blocks
from ullme.token_rows import TokenRows

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

T = TypeVar("T")

logger = logging.getLogger(__name__)


def join() -> None:
    """Join the process group of torchrun, if it started this process. Other ranks may wait days for scores."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))


def own_device() -> str | None:
    """This process's GPU, where there are several processes and GPUs; else None."""
    if world()[1] == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def on_every_rank(make: Callable[[], T]) -> T:
    """Call ``make`` on every rank. Raises: ValueError: on all ranks, with the first error, if it failed on any."""
    made, own_error = None, None
    try:
        made = make()
    except ValueError as error:
        own_error = error
    own_message = None if own_error is None else str(own_error)
    messages = [own_message]
    if world()[1] > 1:
        messages = [None] * world()[1]
        dist.all_gather_object(messages, own_message)
    if first := next((message for message in messages if message is not None), None):
        raise own_error or ValueError(first)
    assert made is not None
    return made


def embed_over_ranks(model: ULLME, blocks: Iterable[TokenRows]) -> Iterator[Tensor]:
    """As :func:`ullme.models.encoding.embed_blocks`; on the first rank, while the others :func:`serve`."""
    blocks, ranks = list(blocks), world()[1]
    shares = _exchange(model, [blocks[rank::ranks] for rank in range(ranks)])
    for n in range(len(blocks)):
        yield shares[n % ranks][n // ranks]


def serve(model: ULLME) -> None:
    """Embed for the first rank until it calls :func:`stop_serving`."""
    while _exchange(model, None):  # not empty on any rank until the end
        pass


def stop_serving() -> None:
    """End :func:`serve` on the other ranks."""
    if world()[1] > 1:
        dist.scatter_object_list([None], [None] * world()[1])


def _exchange(model: ULLME, shares: list[list[TokenRows]] | None) -> list[list[Tensor]]:
    """Scatter the blocks, embed this rank's share, and gather the embeddings on the first rank; empty at the end.

    Raises:
        RuntimeError: on the first rank alone: a rank failed. All ranks stay ready for the next blocks.
    """
    rank, ranks = world()
    mine: list[list[TokenRows] | None] = [None]
    dist.scatter_object_list(mine, shares)
    if mine[0] is None:
        return []
    error, embedded = None, []
    try:
        embedded = [*embed_blocks(model, mine[0])]
    except Exception as reason:
        logger.exception("evaluate: rank %d cannot embed", rank)
        error = f"{type(reason).__name__}: {reason}"
    found: list[tuple[str | None, list[Tensor]]] = [(None, [])] * ranks
    dist.gather_object((error, embedded), found if rank == 0 else None)
    if failed := [f"rank {n}: {message}" for n, (message, _) in enumerate(found) if message is not None]:
        raise RuntimeError("; ".join(failed))
    return [share for _, share in found]
