"""Evaluation over several processes (``torchrun --nproc-per-node N evaluate.py ...``).

The first process runs mteb, alone: it loads the tasks, computes the scores, writes the results and prints. The others
hold the model and embed their share of the texts. Batches are cut as in a single process and dealt out one by one, so
every embedding, and with it every score, is the single process's to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ullme.batch import TokenRows
from ullme.distributed import world
from ullme.models.encoding import embed_blocks

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

T = TypeVar("T")


def join() -> None:
    """Meet the other processes that torchrun started, if it did. They may wait for days, while scores are computed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))


def own_device() -> str | None:
    """This process's GPU, where there are several processes and GPUs; else None."""
    if world()[1] == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def on_every_rank(make: Callable[[], T]) -> T:
    """``make()``, and the first rank's mistake on every rank. Raises: ValueError: it failed anywhere."""
    made, mistake = None, None
    try:
        made = make()
    except ValueError as error:
        mistake = error
    mistakes: list[str | None] = [None if mistake is None else str(mistake)]
    if world()[1] > 1:
        mistakes = [None] * world()[1]
        dist.all_gather_object(mistakes, None if mistake is None else str(mistake))
    if first := next((text for text in mistakes if text is not None), None):
        raise mistake or ValueError(first)
    assert made is not None
    return made


def embed_over_ranks(model: ULLME, blocks: Iterable[TokenRows]) -> Iterator[Tensor]:
    """As :func:`ullme.models.encoding.embed_blocks`; on the first rank, while the others :func:`serve`."""
    blocks, ranks = list(blocks), world()[1]
    shares = _exchange(model, [blocks[rank::ranks] for rank in range(ranks)])
    for n in range(len(blocks)):
        yield shares[n % ranks][n // ranks]


def serve(model: ULLME) -> None:
    """Embed for the first rank until it lets go."""
    while _exchange(model, None):
        pass


def let_go() -> None:
    """End :func:`serve` on the other ranks."""
    if world()[1] > 1:
        dist.scatter_object_list([None], [None] * world()[1])


def _exchange(model: ULLME, shares: list[list[TokenRows]] | None) -> list[list[Tensor]]:
    """Give every rank its share, embed one's own, and bring all back to the first rank; empty: there is no more."""
    rank, ranks = world()
    mine: list[list[TokenRows] | None] = [None]
    dist.scatter_object_list(mine, shares)
    if mine[0] is None:
        return []
    found: list[list[Tensor]] = [[]] * ranks
    dist.gather_object([*embed_blocks(model, mine[0])], found if rank == 0 else None)
    return found
