"""Two thousand steps of GRL with checkpoints, validations and two kills: nothing grows, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from children import wait_until
from interrupted import before_step, start  # noqa: F401 - start is a fixture
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme.demo.world import build_world
from ullme.utils import atomic_files

STEPS, KILLS = 2000, (700, 1400)
WARM_UP = 250  # steps of a start until caches are full


class Watch(L.Callback):
    """Notes memory, open files and child processes every 10 steps."""

    def __init__(self, notes: str) -> None:
        self.notes = notes

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step % 10 == 0:
            with Path(self.notes).open("a") as file:
                print(json.dumps([os.getpid(), trainer.global_step, resident(), open_files(), children()]), file=file)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> int:
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def in_group(group: int) -> list[str]:
    """Command lines of the processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                found.append((folder / "cmdline").read_text())
        except (ProcessLookupError, FileNotFoundError):
            pass
    return found


def alone(then: Callable[[], None]) -> Callable[[], None]:
    """In a process group of its own, so that what it leaves behind can be found."""

    def begin() -> None:
        os.setpgid(0, 0)
        then()

    return begin


@pytest.mark.slow
def test_two_thousand_steps(start, tmp_path, monkeypatch):  # noqa: F811
    world = build_world(tmp_path / "world", train_entities=60, val_entities=24, dev_entities=24)
    notes = tmp_path / "notes"
    command = (
        "--loss=GRL",
        f"--data.train={world.train_file}",
        f"--data.val={world.val_folder}",
        "--trainer.max_epochs=-1",
        f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=200",
        "--trainer.check_val_every_n_epoch=null",
        "--checkpoint.every_n_train_steps=50",
        "--data.num_workers=1",
        "--loss.chunk_size=16",
        "--trainer.callbacks=test_soak.Watch",
        f"--trainer.callbacks.notes={notes}",
    )
    files = open_files()
    for n, kill in enumerate(KILLS):
        assert start("run", f"start{n}", *command, then=alone(lambda k=kill: before_step(k))) == -signal.SIGKILL
    assert start("run", "start2", *command, then=alone(lambda: None)) == 0, (tmp_path / "start2.err").read_text()

    losses = logged(tmp_path / "start2", "train/loss")
    assert max(losses) == STEPS - 1
    table = np.array([json.loads(line) for line in notes.read_text().splitlines()])
    processes = list(dict.fromkeys(table[:, 0].tolist()))
    assert len(processes) == 3
    for process in processes:
        steps, memory, handles, workers = table[table[:, 0] == process][:, 1:].T
        warm = steps >= steps[0] + WARM_UP
        early, late = memory[warm][:10].mean(), memory[warm][-10:].mean()
        print(f"steps {steps[0]}..{steps[-1]}: {early / 2**20:.1f} MiB, then {late / 2**20:.1f} MiB")
        assert late < 1.05 * early
        assert handles[warm].max() <= handles[warm][0] + 2  # one file may be open for a moment
        assert set(workers[warm]) <= {1, 2, 3}  # the loaders of training, of the corpus and of the queries
    # a worker looks for its parent every few seconds
    wait_until(lambda: not any(in_group(process) for process in processes), "the end of all workers")
    assert open_files() <= files + 1
    left = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(atomic_files.UNFINISHED)]
    assert len(left) == 3  # last, best, finished
