"""Which files a name in ``data.train`` means, and of what kind they are."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ullme.data.jsonl import COMPRESSIONS

_JSONL = (".jsonl", ".json", ".ndjson")
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
# Files that datasets' save_to_disk leaves in a folder.
SAVED_TO_DISK = ("dataset_info.json", "dataset_dict.json")


def expand_files(name: str, split: str) -> list[Path]:
    """The files of a path, a pattern or a folder, sorted. Raises: ValueError: there are none."""
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if is_lines(p) and p.is_file())
        of_split = [p for p in files if re.match(rf"{re.escape(split)}[-._]", p.name)]
        files = of_split or files
    elif path.is_file():
        files = [path]
    else:
        files = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
    if not files:
        raise ValueError(f"data.train={name!r}: no such file; check the path (it is read relative to {Path.cwd()})")
    return files


def is_jsonl(name: str) -> bool:
    """Whether a name in ``data.train`` is a JSONL file, pattern or folder, not a dataset."""
    path = Path(name)
    if not path.is_dir():
        found = [path] if path.is_file() else [Path(file) for file in glob.glob(name, recursive=True)]
        return all(map(is_lines, found)) if found else is_lines(path)
    saved = any((path / marker).exists() for marker in SAVED_TO_DISK)
    return not saved and any(suffix(p) in _JSONL for p in path.iterdir())


def suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def is_lines(path: Path) -> bool:
    """Whether a file's name says that it holds JSON lines, compressed or not."""
    return suffix(path.with_suffix("") if suffix(path) in COMPRESSIONS else path) in _JSONL


def is_table(name: str) -> bool:
    return suffix(name) in TABLES


def check_kind(name: str) -> None:
    """Raises: ValueError: a file that is there, or one beside the JSONL files of a folder, is of a kind that is not
    read."""
    if Path(name).is_dir():
        folder = is_jsonl(name)
        files = [p for p in sorted(Path(name).iterdir()) if folder and suffix(p) in _COMPRESSED and not is_lines(p)]
    else:
        there = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
        files = [p for p in there if p.is_file() and not is_lines(p) and suffix(p) not in TABLES]
    if files:
        remedy = "unpack it first" if suffix(files[0]) in _COMPRESSED else "convert it to JSONL"
        read = ", ".join([*_JSONL, ".jsonl.gz", ".jsonl.zst", *TABLES])
        raise ValueError(f"data.train={name!r}: {files[0]} is no file of a kind that is read ({read}); {remedy}")
