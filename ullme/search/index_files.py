"""What the indexes beside the shards have in common: which shards they are of, and how they get their names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ullme.search.shards import Shards
from ullme.utils import atomic_files

DESCRIPTION = "index.json"


def read_description(shards: Shards, folder: str) -> dict[str, Any] | None:
    """What stands in an index's index.json; None if there is no such index.

    Raises:
        ValueError: it is damaged, or was built from other shards.
    """
    path = shards.folder / folder / DESCRIPTION
    if not path.is_file():
        return None
    again = f"run `ullme index {shards.folder}` again, or remove {path.parent}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, files = content["shards"], content["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {again}") from None
    if known != shards.digest:
        raise ValueError(f"{path.parent} is an index of other shards than are in {shards.folder} now; {again}")
    for name, size in files.items():
        if not (path.parent / name).is_file() or (path.parent / name).stat().st_size != size:
            raise ValueError(f"{path.parent / name} is missing or truncated; {again}")
    return content


def write_index(shards: Shards, folder: str, write: Callable[[Path], dict[str, Any]]) -> None:
    """Write an index into a folder beside the shards, which gets its name only when it is whole.

    Args:
        shards: that it is of.
        folder: its name.
        write: writes the files into a folder, and returns what to keep in index.json.

    Raises:
        StorageError: no space, or no permission.
    """
    target = shards.folder / folder
    new = shards.folder / f"{atomic_files.UNFINISHED}{os.getpid()}.{folder}"
    _remove_unfinished(shards.folder, folder)
    try:
        new.mkdir()
        description = write(new)
        files = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        content = {"shards": shards.digest, "files": files, **description}
        (new / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(new, target)
    except OSError as error:
        raise atomic_files.StorageError(
            f"{str(target)!r} cannot be written ({error.strerror or error}); free space or fix the permissions"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_unfinished(place: Path, folder: str) -> None:
    """Remove what a killed `ullme index` left."""
    for path in place.glob(f"{atomic_files.UNFINISHED}*.{folder}"):
        shutil.rmtree(path, ignore_errors=True)
