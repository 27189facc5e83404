"""Several gloo processes on this machine, forked from the test's own, so that they cost no imports."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from children import PATIENCE, default_signals


def _work(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from ullme.distributed import leave_process_group

    default_signals()
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # processes of their own draw different numbers
    # as torchrun does, so that Lightning starts no processes of its own
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    names = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**numbers, **names}.items()})
    # a rank that waits for a forward that another does not do is a failure
    waits = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", f"file://{folder}/init", timeout=waits, rank=rank, world_size=world_size)
    result = function(*args)
    torch.save(result, f"{folder}/{rank}.pt")
    leave_process_group()


def on_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each rank of a fresh process group. ``function`` stands in a module."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "init").unlink(missing_ok=True)
    mp.start_processes(_work, (world_size, str(folder), function, args), nprocs=world_size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
