"""Running the missing cells of a table: several at a time where there are devices, each in processes of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
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

from ullme.callbacks.checkpoint import STOPPED_FILE
from ullme.commands.reproduce.cells import Cell, shell_line
from ullme.commands.reproduce.collect import TASKS_FILE, add_seconds, collect_scores
from ullme.commands.reproduce.scores import SCORES_FILE
from ullme.training.resume import FINISHED
from ullme.training.signals import TERMINATED
from ullme.utils import atomic_files

SETTINGS_FILE = "settings.json"
STOP_TIMEOUT = 300  # seconds that a training has to save a checkpoint after SIGTERM


class CellError(Exception):
    """A cell failed or was stopped; the text says why."""


class Devices:
    """A pool of GPUs: :meth:`take` waits until enough of them are free.

    Args:
        names: as in CUDA_VISIBLE_DEVICES; empty on a machine without GPUs.
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
    """Trains and evaluates cells.

    Args:
        cells: the missing ones, in order.
        parallel: how many at a time; on GPUs no more than the devices allow.
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
        """Run all cells.

        Returns:
            Cell name -> why it failed, in several lines where tasks failed; empty if all succeeded.

        Raises:
            KeyboardInterrupt: after SIGINT or SIGTERM, once the trainings have saved their checkpoints.
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
        """Run one cell. Returns: why it failed, or None."""
        if self.stopping:
            return "stopped"
        try:
            with self.devices.take(self._gpus_for(cell)) as mine, locked(cell.folder) as lock:
                self._run_cell(cell, mine, lock)
        except (CellError, ValueError, OSError) as error:
            if not self.stopping:
                print(f"reproduce: {cell.name} failed: {error}", file=sys.stderr, flush=True)
            return str(error)
        return None

    def _gpus_for(self, cell: Cell) -> int:
        wanted = cell.devices
        return self.devices.count if wanted == "auto" else int(wanted or 0)

    def _run_cell(self, cell: Cell, devices: list[str], lock: IO[str]) -> None:
        settings = cell.folder / SETTINGS_FILE
        text = json.dumps(cell.settings(), indent=1)
        atomic_files.write_text(settings, text, "--output")
        for stage, folder in cell.stages:
            if not (folder / "checkpoints" / FINISHED).is_file():
                log = cell.folder / f"{folder.name}.log"
                self._run_process(cell, "training", cell.train_command(stage), devices, log, lock, {})
        if cell.stop_after is not None:
            if not (cell.stages[0][1] / STOPPED_FILE.format(cell.stop_after)).is_file():
                raise CellError(f"the training ended before step {cell.stop_after}, at which sweep.stop compares it")
            return
        command = with_torchrun(cell.evaluate_command(), len(devices))
        named = cell.evaluate_environment()
        tasks = cell.folder / TASKS_FILE
        tasks.unlink(missing_ok=True)
        try:
            self._run_process(cell, "evaluating", command, devices, cell.folder / "evaluate.log", lock, named)
        except CellError:
            if self.stopping or not tasks.is_file():
                raise
        scores = collect_scores(cell)
        if scores.failed:
            count = f"{len(scores.failed)} of {len(scores.failed) + len(scores.tasks)} tasks failed"
            raise CellError("\n".join([count, *scores.failed.values()]))

    def _run_process(
        self,
        cell: Cell,
        what: str,
        command: list[str],
        devices: list[str],
        log: Path,
        lock: IO[str],
        named: Mapping[str, str],
    ) -> None:
        """Run a command with ``named`` in its environment and wait. Raises: CellError: it failed or was stopped."""
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
            file.write(f"$ {shell_line(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # the cell stays locked as long as its process lives
            )
            self.running.add(process)
            if self.stopping:
                self._signal(process)
            status = process.wait()
            self.running.discard(process)
        seconds = time.perf_counter() - started
        add_seconds(cell, log.stem, seconds)
        if status == TERMINATED and cell.stop_after is not None and not self.stopping:
            status = 0
        if status:
            ended = f"status {status}" if status > 0 else signal.Signals(-status).name
            raise CellError(
                "stopped" if self.stopping else f"{what} ended with {ended}: {failure_reason(log, begin)} (see {log})"
            )
        reached = "" if cell.stop_after is None else f" to step {cell.stop_after}"
        print(f"== {cell.name}: {what}{reached}: {seconds:.0f} s", flush=True)

    def _stop(self) -> None:
        """Send SIGTERM to every process and wait until it has saved and ended."""
        self.stopping = True
        print("reproduce: stopping; the same command continues from here", file=sys.stderr, flush=True)
        for process in list(self.running):
            self._signal(process)
        deadline = time.monotonic() + STOP_TIMEOUT
        for process in list(self.running):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"reproduce: process {process.pid} did not end in {STOP_TIMEOUT} s: killed", file=sys.stderr)
                self._signal(process, signal.SIGKILL)

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], what: signal.Signals = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, what)


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Lock a cell against other processes.

    Raises:
        CellError: it is locked, by another ``ullme reproduce`` or by a training that an earlier one left running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CellError(f"another process works on {folder}; wait for it or stop it") from None
        yield file


def done(cell: Cell) -> bool:
    """Whether the cell has scores that were made with these settings.

    Raises:
        ValueError: the folder was made with other settings.
    """
    file = cell.folder / SETTINGS_FILE
    if file.is_file():
        then, now = json.loads(file.read_text()), cell.settings()
        if changed := differing(then, now):
            key = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"{cell.folder} holds results of other settings: {key}={_short(then[key])} "
                f"(now {_short(now[key])}){more}; give another --output, or delete the folder"
            )
    scores = cell.folder / SCORES_FILE
    return scores.is_file() and not json.loads(scores.read_text()).get("failed")


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings whose values differ. Those of only one side are ignored: they are another version's."""
    return [key for key in sorted(then.keys() & now.keys()) if then[key] != now[key]]


def _short(value: Any) -> str:
    return f"{value!r:.200}"


def with_torchrun(command: list[str], devices: int) -> list[str]:
    """The command of the evaluation, under torchrun where there are several GPUs."""
    if devices < 2:
        return command
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", *command]


def failure_reason(log: Path, begin: int = 0) -> str:
    """The last line of a log with the word error, or else its last line; text before byte ``begin`` is ignored."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines[-50:] if "error" in line.lower()]
    return ([*lines[-1:], *wrong])[-1][:500] if lines else "no output"


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
