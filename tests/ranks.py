"""Several gloo processes on this machine, started cheaply: a server imports the libraries once and forks them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = [
    "ullme.commands.train",
    "ullme.models.ullme",
    "ullme.models.trained_weights",
    "peft",
    "transformers.models.auto.modeling_auto",
]


def _work(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from ullme.distributed import leave

    torch.set_num_threads(1)
    # as torchrun does, so that Lightning starts no processes of its own
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    names = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**numbers, **names}.items()})
    # one rank that waits for a forward that another does not do is a failure, soon
    waits = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/init", timeout=waits, rank=rank, world_size=world_size)
    result = function(*args)
    torch.save(result, f"{folder}/{rank}.pt")
    leave()


def on_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each rank of a fresh process group. ``function`` stands in a module."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "init").unlink(missing_ok=True)
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    mp.start_processes(_work, (world_size, str(folder), function, args), nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
