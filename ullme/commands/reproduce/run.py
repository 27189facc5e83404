"""Running cells: several at a time where devices allow, each as the commands it would be by hand."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from typing import IO, Any

from ullme.commands.reproduce.cells import Cell
from ullme.commands.reproduce.finish import add_seconds, finish
from ullme.commands.reproduce.scores import SCORES_FILE
from ullme.training.resume import FINISHED
from ullme.utils import atomic_files

SETTINGS_FILE = "settings.json"
PATIENCE = 300  # seconds that a training has to save itself in when it is told to stop


class CellError(Exception):
    """A cell that could not be done, and why."""


class Devices:
    """GPUs to be shared out: who asks for n waits until n are free.

    Args:
        names: as CUDA_VISIBLE_DEVICES has them; empty on a machine without.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.free = list(names)
        self.count = len(names)
        self.changed = Condition()

    @contextmanager
    def take(self, wanted: int) -> Iterator[list[str]]:
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= wanted)
            mine, self.free = self.free[:wanted], self.free[wanted:]
        try:
            yield mine
        finally:
            with self.changed:
                self.free = sorted([*self.free, *mine])
                self.changed.notify_all()


class Runner:
    """Does cells.

    Args:
        cells: the missing ones, in order.
        parallel: how many at a time; on GPUs no more than there are devices for.
        devices: the GPUs.
        threads: of each process on a CPU.
    """

    def __init__(self, cells: Sequence[Cell], parallel: int, devices: Devices, threads: int) -> None:
        self.cells = cells
        self.parallel = parallel
        self.devices = devices
        self.threads = threads
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def run(self) -> dict[str, str]:
        """Cell name -> why it failed; empty if all are done.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; trainings have been given the time to save themselves.
        """
        earlier = signal.signal(signal.SIGTERM, _interrupt)
        failed: dict[str, str] = {}
        pool = ThreadPoolExecutor(self.parallel)
        try:
            for cell, error in zip(self.cells, pool.map(self._try, self.cells), strict=True):
                if error:
                    failed[cell.name] = error
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            signal.signal(signal.SIGTERM, earlier)
        return failed

    def _try(self, cell: Cell) -> str | None:
        """Why a cell failed; the others go on."""
        if self.stopping:
            return "stopped"
        try:
            with self.devices.take(self._wanted(cell)) as mine, locked(cell.folder) as lock:
                self._do(cell, mine, lock)
        except (CellError, ValueError, OSError) as error:
            if not self.stopping:
                print(f"reproduce: {cell.name} failed: {error}", file=sys.stderr, flush=True)
            return str(error)
        return None

    def _wanted(self, cell: Cell) -> int:
        wanted = cell.devices
        return self.devices.count if wanted == "auto" else int(wanted or 0)

    def _do(self, cell: Cell, devices: list[str], lock: IO[str]) -> None:
        settings = cell.folder / SETTINGS_FILE
        text = json.dumps(cell.settings(), indent=1)
        atomic_files.write_atomically(settings, lambda file: file.write(text.encode()))
        for stage, folder in cell.stages:
            if not (folder / "checkpoints" / FINISHED).is_file():
                log = cell.folder / f"{folder.name}.log"
                self._call(cell, "training", cell.train_command(stage), devices, log, lock, {})
        command = over_ranks(cell.evaluate_command(), len(devices))
        named = cell.evaluate_environment()
        self._call(cell, "evaluating", command, devices, cell.folder / "evaluate.log", lock, named)
        finish(cell)

    def _call(
        self,
        cell: Cell,
        what: str,
        command: list[str],
        devices: list[str],
        log: Path,
        lock: IO[str],
        named: Mapping[str, str],
    ) -> None:
        """Run it to its end, with ``named`` in its environment. Raises: CellError: it failed, or was stopped."""
        if self.stopping:
            raise CellError("stopped")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **named}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        else:
            environment["CUDA_VISIBLE_DEVICES"] = ""
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        where = f" on GPU {','.join(devices)}" if devices else ""
        print(f"== {cell.name}: {what}{where}", flush=True)
        started = time.perf_counter()
        with log.open("ab") as file:
            begin = file.seek(0, os.SEEK_END)
            file.write(f"$ {shell(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # so that the cell stays locked as long as its process lives
            )
            self.running.add(process)
            if self.stopping:
                self._tell(process)
            status = process.wait()
            self.running.discard(process)
        seconds = time.perf_counter() - started
        add_seconds(cell, log.stem, seconds)
        if status:
            ended = f"status {status}" if status > 0 else signal.Signals(-status).name
            raise CellError("stopped" if self.stopping else f"{what} ended with {ended}: {why(log, begin)} (see {log})")
        print(f"== {cell.name}: {what}: {seconds:.0f} s", flush=True)

    def _stop(self) -> None:
        """Let every process save itself and end."""
        self.stopping = True
        print("reproduce: stopping; the same command goes on from here", file=sys.stderr, flush=True)
        for process in list(self.running):
            self._tell(process)
        deadline = time.monotonic() + PATIENCE
        for process in list(self.running):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"reproduce: process {process.pid} did not end in {PATIENCE} s: killed", file=sys.stderr)
                self._tell(process, signal.SIGKILL)

    @staticmethod
    def _tell(process: subprocess.Popen[bytes], what: signal.Signals = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, what)


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Nobody else works on this cell meanwhile.

    Raises:
        CellError: somebody does: another reproduce, or a training that an earlier one left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CellError(f"another process is at work on {folder}; wait for it, or end it") from None
        yield file


def done(cell: Cell) -> bool:
    """Whether the cell has its scores, made with these settings.

    Raises:
        ValueError: it, or what there is of it, was made with other settings.
    """
    file = cell.folder / SETTINGS_FILE
    if file.is_file():
        then, now = json.loads(file.read_text()), cell.settings()
        if changed := differing(then, now):
            key = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"{cell.folder} holds a cell made with other settings: {key}={_short(then[key])} "
                f"(now {_short(now[key])}){more}; give another --output, or delete the folder"
            )
    return (cell.folder / SCORES_FILE).is_file()


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Options with two values. One that only one side has does not count: another version may know more, or fewer."""
    return [key for key in sorted(then.keys() & now.keys()) if then[key] != now[key]]


def _short(value: Any) -> str:
    return f"{value!r:.200}"


def over_ranks(command: list[str], devices: int) -> list[str]:
    """The evaluation spread over several GPUs."""
    if devices < 2:
        return command
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", *command]


def shell(command: Sequence[str]) -> str:
    """As a shell line."""
    return f"python {shlex.join(command)}"


def why(log: Path, begin: int = 0) -> str:
    """The last line of a log that says error, or else its last line; what stands before byte ``begin`` is older."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines[-50:] if "error" in line.lower()]
    return ([*lines[-1:], *wrong])[-1][:500] if lines else "it said nothing"


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
