"""Runs in processes of their own, which are killed or told to leave, and what they end with.

Runs are forked from the test's process, so that each costs no imports; SIGKILL is real.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from children import PATIENCE, default_signals
from lightning.pytorch.utilities import rank_zero_only
from test_training import arguments, logged  # noqa: F401 - arguments is a fixture

from ullme.commands import train
from ullme.training.module import ULLMEModule
from ullme.utils import atomic_files

# Validation in the middle and at the end of each of two epochs of 6 steps, a checkpoint at other steps; dropout is on.
RUN = ("--trainer.max_epochs=2", "--checkpoint.every_n_train_steps=2", "--trainer.val_check_interval=3")


@pytest.fixture
def start(arguments, tmp_path):  # noqa: F811
    """Start a command in a process of its own; each start logs into a folder of its own, named by ``log``."""

    def run(
        name: str,
        log: str,
        *extra: str,
        then: Callable[[], None] = lambda: None,
        ranks: int = 1,
        within: float = PATIENCE,
    ) -> int:
        # a finished logger would write over the losses of the start before
        argv = arguments(name, *RUN, *extra, f"--trainer.logger.save_dir={tmp_path / log}")
        if ranks > 1:
            argv.append(f"--trainer.devices={ranks}")
        port = str(free_port())
        processes = []
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                if ranks > 1:  # what torchrun and SLURM tell a process
                    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(ranks)}
                    rank_zero_only.rank = rank  # which Lightning sets when it is imported
                play(argv, tmp_path / (log if not rank else f"{log}-{rank}"), then)
            processes.append(pid)
        try:
            return wait(processes[0], within)
        finally:
            for pid in processes[1:]:  # as torchrun does
                with suppress(TimeoutError):
                    wait(pid, 60)

    return run


def play(argv: list[str], out: Path, then: Callable[[], None]) -> None:
    """In a process of its own: run a command, with its output in files, and leave without cleaning up pytest."""
    code = 1
    try:
        default_signals()
        for target, handle in ((".out", 1), (".err", 2)):
            os.dup2(os.open(f"{out}{target}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), handle)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        then()
        train.main(argv)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait(pid: int, within: float) -> int:
    """The exit status; minus the signal's number for a process that a signal ended."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the run did not end within {within} s")


@pytest.fixture(scope="module")
def ended() -> dict[tuple, dict]:
    """Ends of uninterrupted runs, by their strategy."""
    return {}


@pytest.fixture
def end_of_whole_run(start, tmp_path, ended):
    def get(*strategy: str, ranks: int = 1) -> dict:
        if strategy not in ended:
            assert start("whole", "whole", *strategy, ranks=ranks) == 0, (tmp_path / "whole.err").read_text()
            ended[strategy] = end(tmp_path, "whole", ["whole"])
        return ended[strategy]

    return get


def end(folder: Path, name: str, logs: list[str]) -> dict:
    """Weights, moments, progress and every logged number, of which a start after a kill may log some again."""
    stored = torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)
    numbers = {}
    for column in ("train/loss", "train/grad_norm", "lr", "val/ndcg@10"):
        found: dict[int, float] = {}
        for log in logs:
            if (folder / log / "metrics.csv").is_file():
                new = logged(folder / log, column)
                assert all(found[step] == new[step] for step in found.keys() & new.keys())
                found |= new
        numbers[column] = found
    progress = {k: stored[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}
    (checkpoint,) = (s for k, s in stored["callbacks"].items() if "Checkpoint" in k)
    best = {Path(path).name: score.item() for path, score in checkpoint["best_k_models"].items()}
    return {**progress, "best": best, "logged": numbers}


def assert_same(a: object, b: object, where: str = "") -> None:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{n}]")
    else:
        assert a == b, where


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_step(step: int) -> None:
    inner = ULLMEModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            kill_me()
        return inner(self, batch, batch_idx)

    ULLMEModule.training_step = training_step


def in_validation(number: int) -> None:
    inner, seen = ULLMEModule.validation_step, []

    def validation_step(self, *args, **kwargs):
        seen.append(self.global_step)
        if len(set(seen)) == number:
            kill_me()
        return inner(self, *args, **kwargs)

    ULLMEModule.validation_step = validation_step


def in_save(number: int) -> None:
    """Half of the bytes of a checkpoint are written."""
    inner, saves = torch.save, []

    def save(content, file):
        saves.append(1)
        if len(saves) < number:
            return inner(content, file)
        inner(content, whole := io.BytesIO())
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.file.flush()
        kill_me()

    torch.save = save


def before_naming(number: int) -> None:
    """A checkpoint is on the disk under its temporary name."""
    inner, names = os.replace, []

    def replace(old, new):
        names.append(new)
        if len([n for n in names if str(n).endswith(".ckpt")]) == number:
            kill_me()
        inner(old, new)

    atomic_files.os.replace = replace


def after(seconds: float) -> None:
    """Let the kernel end this process once it has worked so long, wherever it is then, however busy the machine."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def only_rank(rank: int, then: Callable[[], None]) -> Callable[[], None]:
    return lambda: then() if os.environ["RANK"] == str(rank) else None


def terminate_in_step(step: int, number: int = signal.SIGTERM) -> None:
    inner = ULLMEModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            os.kill(os.getpid(), number)
        return inner(self, batch, batch_idx)

    ULLMEModule.training_step = training_step


def interrupt_twice_in_step(step: int) -> None:
    """With so much time between that it is no launcher's echo; a third one right behind the first is one."""
    inner = ULLMEModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            for pause in (0, 0, 1.1):
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGINT)
        return inner(self, batch, batch_idx)

    ULLMEModule.training_step = training_step


def terminate_in_validation(number: int = signal.SIGTERM) -> None:
    inner = ULLMEModule.validation_step

    def validation_step(self, *args, **kwargs):
        os.kill(os.getpid(), number)
        return inner(self, *args, **kwargs)

    ULLMEModule.validation_step = validation_step
