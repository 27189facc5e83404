"""Steps that are run in a row, each a command, and the record of those that are finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ullme.utils import atomic_files

RECORD = "steps.json"
FORMAT = 1
_LOCK = "lock"

# Runs a command of ullme, such as ["index", "embeddings"], and returns its exit status.
RunCommand = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Step:
    """A command of ullme.

    Args:
        name: of the step.
        command: arguments of ``ullme``.
        writes: files and folders that it makes; they are removed before the step runs with another command.
        after: names of the steps whose results it reads.
        inputs: what else it reads -> digest of the content.
        keeps: files and folders that it makes, which stay as long as ``keeps_for`` does.
        keeps_for: arguments that what is kept depends on.
    """

    name: str
    command: tuple[str, ...]
    writes: tuple[Path, ...]
    after: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    keeps: tuple[Path, ...] = ()
    keeps_for: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The command for a shell."""
        return shlex.join(["ullme", *self.command])


class Records:
    """``steps.json`` in the folder: what it is of, and for each step the hash of its command and inputs.

    Args:
        folder: of the steps; new, empty, or of an earlier command.
        of: what all steps depend on, name -> (value for messages, digest).

    Raises:
        ValueError: the folder holds other files, or is of another LLM or corpus.
    """

    def __init__(self, folder: Path, of: Mapping[str, tuple[str, str]]) -> None:
        self.path = folder / RECORD
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--to {folder} is a file; name a new folder")
        if not self.path.exists():
            there = [p.name for p in sorted(folder.iterdir()) if p.name != _LOCK] if folder.is_dir() else []
            there = [name for name in there if not name.startswith(atomic_files.UNFINISHED)]
            if there:
                raise ValueError(f"--to {folder} has no {RECORD}, but holds {there[0]}; name a new or an empty folder")
            self._content: dict[str, Any] = {"format": FORMAT, "of": {k: list(v) for k, v in of.items()}, "steps": {}}
            self._save()
            return
        self._content = self._read()
        atomic_files.sweep(folder)
        for name, (value, digest) in of.items():
            known, before = self._content["of"].get(name, ["", ""])
            if before != digest:
                same = "the same name with other content" if known == value else f"{known!r} before"
                raise ValueError(
                    f"--to {folder} is of another {name}: {value!r} now, {same}; name another folder, or remove it"
                )

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, and this version of ullme reads {FORMAT}")
            return content
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} cannot be used ({error}); name another folder, or remove it") from None

    def get(self, name: str) -> dict[str, Any] | None:
        """What is known of a step: ``hash``, ``command``, ``kept``, ``finished``."""
        return self._content["steps"].get(name)

    def put(self, name: str, **record: Any) -> None:
        """Write down a step."""
        self._content["steps"][name] = record
        self._save()

    def _save(self) -> None:
        text = json.dumps(self._content, indent=1, ensure_ascii=False) + "\n"
        atomic_files.write_text(self.path, text, "--to")


def run_steps(steps: Sequence[Step], records: Records, run: RunCommand) -> list[str]:
    """Run the steps that are not finished, in order.

    A step is finished if its record says so with the hash of the same command, inputs and earlier steps, and what it
    writes is there. Whose hash is another one begins anew; one that was stopped goes on.

    Args:
        steps: in order.
        records: of them.
        run: runs a command.

    Returns:
        Names of the steps that ran.

    Raises:
        ValueError: a step failed.
    """
    hashes: dict[str, str] = {}
    ran = []
    for number, step in enumerate(steps, start=1):
        here = hashes[step.name] = _hash([step.command, step.inputs, [hashes[name] for name in step.after]])
        kept = _hash([step.keeps_for, step.inputs, [hashes[name] for name in step.after]])
        title = f"[{number}/{len(steps)}] {step.name}"
        known = records.get(step.name)
        if known is not None and known["hash"] == here and known["finished"] and _all_there(step):
            print(f"{title}: done before\n$ {step.line}", flush=True)
            continue
        if known is not None and known["hash"] != here:
            print(f"{title}: begins anew, its command or what it reads has changed", flush=True)
            _remove(step.writes if known["kept"] == kept else (*step.writes, *step.keeps))
        print(f"{title}\n$ {step.line}", flush=True)
        records.put(step.name, hash=here, command=step.line, kept=kept, finished=False)
        started = time.perf_counter()
        if status := run(step.command):
            raise ValueError(
                f"step {step.name} ended with status {status}; the reason is printed above, and the same command goes "
                f"on from there. By hand: {step.line}"
            )
        if not _all_there(step):
            missing = next(path for path in step.writes if not path.exists())
            raise ValueError(f"step {step.name} ended without {missing}; run it by hand to see why: {step.line}")
        seconds = round(time.perf_counter() - started, 1)
        records.put(step.name, hash=here, command=step.line, kept=kept, finished=True, seconds=seconds)
        ran.append(step.name)
    return ran


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _all_there(step: Step) -> bool:
    return all(path.exists() for path in step.writes)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file or folder. Of a file above 64 MiB, which weights are, its size and time of change count.

    A name of the hub is its own digest.
    """
    place = Path(path)
    if not place.exists():
        return str(path)
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file()):
        status = file.stat()
        digest.update(f"{file.relative_to(place)}\0{status.st_size}\0".encode())
        if status.st_size > 1 << 26:
            digest.update(str(status.st_mtime_ns).encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Lock a folder against other commands, also against what an earlier one that was killed has left running.

    Raises:
        ValueError: it is locked.
    """
    atomic_files.check_writable(folder, "--to")
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--to {folder}: another process works there, perhaps a step of a command that was killed; wait for "
                "it, or stop it"
            ) from None
        yield file


def process_runner(lock: IO[str]) -> RunCommand:
    """Runs each command in a process of its own, which holds the lock too.

    SIGTERM is passed on, so that a training saves a checkpoint; so is Ctrl-C, by the terminal.

    Args:
        lock: of :func:`locked`.
    """

    def run(command: Sequence[str]) -> int:
        process = subprocess.Popen([sys.executable, "-m", "ullme", *command], pass_fds=[lock.fileno()])
        earlier = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, earlier)

    return run
