"""Two processes on this machine against one: the gradient of the same batch, over gloo on the CPU."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ullme.commands.doctor.checks import NotChecked, Trouble
from ullme.commands.doctor.correctness import compare, gradients
from ullme.distributed import average_gradients, leave
from ullme.engine.gradcache import chunk_slices

if TYPE_CHECKING:
    from ullme.commands.doctor.patient import Patient

_RANKS = 2


def two_ranks_are_one(patient: Patient, seconds: float = 90) -> str:
    """Raises: NotChecked: this torch has no gloo; Trouble: another gradient, or the processes do not answer."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise NotChecked("this torch cannot run several processes over gloo")
    model = patient.build()
    whole = gradients(model, lambda: patient.objective.full_batch(model, patient.batch))
    with tempfile.TemporaryDirectory() as folder:
        _run(patient, Path(folder), seconds)
        own, found = (torch.load(Path(folder, name), weights_only=True) for name in ("own.pt", "averaged.pt"))
    if all(torch.equal(own[name], g) for name, g in found.items()):
        raise Trouble("the ranks did not put their gradients together", "look at the network between processes")
    return compare(found, whole, "two processes have another gradient than one")


def _run(patient: Patient, folder: Path, seconds: float) -> None:
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(n, patient, str(folder)), daemon=True) for n in range(_RANKS)]
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    remedy = "check firewalls and GLOO_SOCKET_IFNAME; train on one device until then"
    if None in codes:
        raise Trouble(f"two processes over gloo did not end within {seconds:.0f} s", remedy)
    if any(codes):
        complaints = sorted(path.read_text() for path in folder.glob("*.error"))
        raise Trouble(
            f"a process of two ended with status {max(code or 0 for code in codes)}: {(complaints or ['no word'])[0]}",
            remedy,
        )


def _rank(rank: int, patient: Patient, folder: str) -> None:
    """One of the two, with its share of the queries."""
    try:
        _work(rank, patient, folder)
    except BaseException as error:
        Path(folder, f"{rank}.error").write_text(f"{type(error).__name__}: {str(error)[:300]}")
        os._exit(1)


def _work(rank: int, patient: Patient, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", timedelta(seconds=60), rank=rank, world_size=_RANKS)
    model = patient.build()
    share = len(patient.batch) // _RANKS
    batch = patient.batch[rank * share : (rank + 1) * share]
    step: Callable[[], object] = lambda: patient.objective.grad_cache(model, batch, chunk_slices(batch, 1, None))  # noqa: E731
    own = gradients(model, step)
    average_gradients(p for p in model.parameters() if p.requires_grad)
    if rank == 0:
        averaged = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        torch.save(own, Path(folder, "own.pt"))
        torch.save(averaged, Path(folder, "averaged.pt"))
    leave()
