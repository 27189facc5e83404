"""Files that are there whole or not at all, and that say so when they are damaged.

Knows PyTorch only. A checkpoint is a zip archive of uncompressed records, each with a CRC-32, which ``torch.load``
does not compare; :func:`read` does.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

# Before the name of a file that is being written; the rest is <process>.<name>. Nobody else's files look like this.
UNFINISHED = ".unfinished."


class StorageError(ValueError):
    """A file that cannot be written, or one that was written and is no longer what it was."""


class _Sink:
    """A file for ``torch.save``, which cannot be interrupted by an error: it is kept, to be raised afterwards."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write`` fill a new file, bring it to the disk, and only then give it its name.

    Raises:
        StorageError: no space, no permission, no such folder. What stood under the name before stands there still.
    """
    path = Path(path)
    own = path.with_name(f"{UNFINISHED}{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with own.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(own, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); make room or mend the permissions, or "
            f"name another folder (trainer.default_root_dir){last_good(path.parent)}"
        ) from error
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def save(content: dict[str, Any], path: str | Path) -> None:
    """``torch.save``, whole or not at all. Raises: StorageError: see :func:`write_atomically`."""

    def write(file: BinaryIO) -> None:
        sink: Any = _Sink(file)  # all that torch.save asks of a file
        torch.save(content, sink)
        if sink.error is not None:
            raise sink.error

    write_atomically(path, write)


def read(path: str | Path, map_location: Any = "cpu") -> Any:
    """The content of a file of :func:`save`. Nothing in it is run as code.

    Raises:
        StorageError: damaged, cut short, no checkpoint, or holding objects whose loading would run code.
    """
    path = Path(path)
    damage = find_damage(path)
    if damage is None:
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # whatever a foreign file makes of torch
            damage = type(error).__name__
    raise StorageError(
        f"checkpoint={str(path)!r} cannot be read ({damage}); it is damaged, cut short, or holds objects that are "
        f"refused because loading them would run code{last_good(path.parent, path)}"
    )


def checked(path: str | Path) -> Any:
    """The content, its checksums compared, with tensors that stay in the file until they are used.

    Raises:
        StorageError: damaged, or holding objects whose loading would run code.
    """
    path = Path(path)
    if (damage := find_damage(path)) is None:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a foreign file makes of torch
            damage = f"{type(error).__name__}; it holds objects that are refused because loading them would run code"
    raise StorageError(f"{str(path)!r} is damaged, cut short or foreign ({damage}){last_good(path.parent, path)}")


def find_damage(path: str | Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, without interpreting them; None where they are as written."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # whatever a foreign file makes of zipfile
        return f"{type(error).__name__}: {error}"
    return None if bad is None else f"the checksum of {bad!r} is wrong"


def newest_first(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder and below it, links followed, that of the largest step first.

    Times of files say nothing once a folder was copied. Of several at a step ``last.ckpt`` is the latest.
    """
    found = [
        Path(place, name)
        for place, _, names in _walk(folder)
        for name in names
        if name.endswith(".ckpt") and not name.startswith(UNFINISHED) and os.path.isfile(os.path.join(place, name))
    ]
    return sorted(found, key=lambda p: (_step(p), p.stem == "last", p.stat().st_mtime_ns), reverse=True)


def _walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk`` with links followed, each folder once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield place, folders, names


def _step(path: Path) -> int:
    """The optimizer steps that a checkpoint was saved after; -1 if it cannot be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # whatever a damaged or foreign file makes of torch
        return -1


def check_writable(folder: Path, option: str = "trainer.default_root_dir") -> None:
    """Make the folder and write a file into it.

    Args:
        folder: to write to.
        option: that names it, for the message.

    Raises:
        StorageError: it cannot be made or written.
    """
    probe = folder / f"{UNFINISHED}{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"{option}={str(folder)!r} cannot be written ({error.strerror}); name another folder"
        ) from None


def sweep(folder: str | Path) -> None:
    """Remove what processes left unfinished that are no longer there."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        process = path.name.removeprefix(UNFINISHED).split(".")[0]
        if not (process.isdigit() and _alive(int(process))):
            path.unlink(missing_ok=True)


def last_good(folder: Path, damaged: Path | None = None) -> str:
    """The part of a message that names the newest checkpoint in good order, if there is one."""
    good = next((p for p in newest_first(folder) if p != damaged and find_damage(p) is None), None)
    return "" if good is None else f"; the last good checkpoint is {str(good)!r}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk once its folder is; some file systems cannot do this, and then need not."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)
