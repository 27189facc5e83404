"""Atomic writes, and reads that detect damage.

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

# Prefix of a file that is being written: .unfinished.<process id>.<name>.
UNFINISHED = ".unfinished."


class StorageError(ValueError):
    """A file that cannot be written, or one that is damaged."""


class _Sink:
    """A file for ``torch.save``, which must not see errors of the disk: the first is kept, to be raised afterwards."""

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


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], Any], option: str = "trainer.default_root_dir"
) -> None:
    """Write a new file, sync it to the disk, and only then rename it to ``path``.

    Args:
        path: of the file; its folder is made where it is missing.
        write: fills the open file.
        option: that says where the file goes, for the message.

    Raises:
        StorageError: no space, no permission, no such folder. An earlier file of this name is unchanged.
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
            f"{str(path)!r} cannot be written ({error.strerror or error}); free space or fix the permissions, or "
            f"choose another place with {option}{last_good(path.parent)}"
        ) from error
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, option: str = "trainer.default_root_dir") -> None:
    """As :func:`write_atomically`, a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()), option)


def save(content: dict[str, Any], path: str | Path) -> None:
    """An atomic ``torch.save`` into the run folder. Raises: StorageError: see :func:`write_atomically`."""

    def write(file: BinaryIO) -> None:
        sink: Any = _Sink(file)  # has all that torch.save needs of a file
        torch.save(content, sink)
        if sink.error is not None:
            raise sink.error

    write_atomically(path, write)


def read(path: str | Path, map_location: Any = "cpu") -> Any:
    """Read a file of :func:`save`. Nothing in it is run as code.

    Raises:
        StorageError: damaged, truncated, not a checkpoint, or with objects whose loading would run code.
    """
    path = Path(path)
    damage = find_damage(path)
    if damage is None:
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # whatever a foreign file makes of torch
            damage = type(error).__name__
    raise StorageError(
        f"checkpoint={str(path)!r} cannot be read ({damage}); it is damaged, truncated, or holds objects that are "
        f"refused because loading them would run code{last_good(path.parent, path)}"
    )


def checked(path: str | Path) -> Any:
    """Check the checksums of a file and map it into memory: tensors are read only when they are used.

    Raises:
        StorageError: damaged, or holding objects whose loading would run code.
    """
    path = Path(path)
    if (damage := find_damage(path)) is None:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a foreign file makes of torch
            damage = f"{type(error).__name__}; it holds objects that are refused because loading them would run code"
    raise StorageError(
        f"{str(path)!r} is damaged, truncated or not a checkpoint ({damage}){last_good(path.parent, path)}"
    )


def find_damage(path: str | Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, found by its checksums; None where nothing is."""
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


def _step(path: Path) -> float:
    """The optimizer steps that a checkpoint was saved after; -1 if it cannot be read.

    A damaged ``last.ckpt`` counts as the latest, so that it is reported instead of an older one taken in silence.
    """
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # whatever a damaged or foreign file makes of torch
        return float("inf") if path.stem == "last" else -1


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


def sweep(folder: str | Path, names: str = "*") -> None:
    """Remove unfinished files of processes that no longer run.

    Args:
        folder: to look in.
        names: pattern of what stands behind the prefix: the process's number, a dot and the file's name.
    """
    for path in Path(folder).glob(f"{UNFINISHED}{names}"):
        process = path.name.removeprefix(UNFINISHED).split(".")[0]
        if not (process.isdigit() and _alive(int(process))):
            path.unlink(missing_ok=True)


def last_good(folder: Path, damaged: Path | None = None) -> str:
    """The end of an error message that names the newest undamaged checkpoint, if there is one."""
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
    """Make a rename durable by syncing the folder; file systems that cannot do this are skipped."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)
