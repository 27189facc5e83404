"""The folder that keeps the indices of checked rows: one entry a source, each a folder of its own.

An entry is written under another name and renamed when it is whole; one process writes it, the others wait. A process
that uses an entry holds a shared lock on it, so that neither the size limit nor ``ullme cache --clear`` removes it.
Locks are held by open files and end with their process, also where a container or another machine has its own process
numbers.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from ullme.utils.atomic_files import UNFINISHED, check_writable

try:
    import fcntl
except ImportError:  # Windows, where open files cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

CACHE_VARIABLE = "ULLME_CACHE"
LIMIT_VARIABLE = "ULLME_CACHE_GB"
DEFAULT_LIMIT = 100.0  # GB
FACTS = "index.json"  # the file of an entry that is locked, and whose time is that of the last use
# Seconds after which a process that waits for another one says so.
SILENT_WAIT = 5.0


def cache_root(cache_dir: str | None = None) -> Path:
    """The folder of all indices."""
    given = cache_dir or os.environ.get(CACHE_VARIABLE)
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ullme"
    return (Path(given) if given else default) / "rows"


def writable_root(cache_dir: str | None) -> Path | None:
    """The folder of all indices; None, with a warning, where it is not writable and was not named.

    Raises:
        ValueError: it was named.
    """
    root = cache_root(cache_dir)
    try:
        check_writable(root, "data.cache_dir")
    except ValueError as error:
        if cache_dir is not None:
            raise
        log.warning(
            "data: rows are checked again at every start and by every process: %s (data.cache_dir or $%s)",
            error,
            CACHE_VARIABLE,
        )
        return None
    return root


def entries(root: Path) -> list[tuple[Path, int, float]]:
    """(folder, bytes, time of last use in seconds since 1970) of every whole entry, the longest unused first."""
    found = []
    for folder in root.glob("*/") if root.is_dir() else ():
        if (folder / FACTS).is_file():
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append((folder, size, (folder / FACTS).stat().st_mtime))
    return sorted(found, key=lambda entry: entry[2])


def clear(root: Path) -> tuple[int, int]:
    """Remove every entry that no process uses. Returns: the bytes that were freed, and how many entries are in use."""
    removed = [(size, _remove(folder)) for folder, size, _ in entries(root)]
    _sweep(root)
    return sum(size for size, gone in removed if gone), sum(not gone for _, gone in removed)


def evict(root: Path, keep: Path) -> None:
    """Remove the entries that were not used for longest until the cache is below its limit; none that is in use."""
    limit = size_limit()
    found = entries(root)
    total = sum(size for _, size, _ in found)
    for folder, size, _ in found:
        if total > limit and folder != keep and _remove(folder):
            log.info("data: the cache %s is above %.0f GB ($%s): %s removed", root, limit / 1e9, LIMIT_VARIABLE, folder)
            total -= size


def size_limit() -> float:
    """The size of the cache in bytes above which unused entries are removed. Raises: ValueError: $ULLME_CACHE_GB."""
    given = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT))
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(f"{LIMIT_VARIABLE}={given!r} must be a size in GB, such as 50")
    return limit * 1e9


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock for making an entry, which one process at a time has; a long wait for it is logged.

    Args:
        folder: of the entry.
        what: is checked, for the message.
    """
    lock = FileLock(_lock_file(folder))
    try:
        lock.acquire(timeout=SILENT_WAIT)
    except Timeout:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes of a run are silent
            log.info("data: another process checks the rows of %s; waiting for its index", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def use(folder: Path) -> IO[bytes] | None:
    """Keep an entry from being removed as long as the file that is returned is open; None: there is no entry."""
    try:
        file = (folder / FACTS).open("rb")
    except OSError:
        return None
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A folder to write to, renamed to ``folder`` at the end and removed after an error; within :func:`alone`.

    Raises:
        ValueError: the disk is full, or the folder cannot be written.
    """
    root = folder.parent
    place = root / f"{UNFINISHED}{os.getpid()}.{folder.name}"
    _sweep(root, folder)
    place.mkdir()
    try:
        yield place
        os.replace(place, folder)
    except OSError as error:
        raise ValueError(
            f"the index of the rows cannot be written to {root} ({error.strerror or error}); free space, or choose "
            f"another folder with data.cache_dir or ${CACHE_VARIABLE}"
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _remove(folder: Path) -> bool:
    """Remove an entry. Returns: whether no process used it."""
    with suppress(OSError), (folder / FACTS).open("rb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks
                pass
        shutil.rmtree(folder)
    return True


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _sweep(root: Path, own: Path | None = None) -> None:
    """Remove what processes that were killed left behind: what nobody has the lock of.

    Args:
        root: of all entries.
        own: the entry whose lock this process has.
    """
    for place in root.glob(f"{UNFINISHED}*.*/") if root.is_dir() else ():
        folder = root / place.name.rpartition(".")[2]
        if folder == own:
            shutil.rmtree(place, ignore_errors=True)
            continue
        with suppress(Timeout), FileLock(_lock_file(folder), timeout=0):
            shutil.rmtree(place, ignore_errors=True)
