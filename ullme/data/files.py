"""Which files a name in ``data.train`` means, and of what kind they are."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from ullme.data.jsonl import COMPRESSIONS

_JSONL = (".jsonl", ".json", ".ndjson")
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
# Files that datasets' save_to_disk leaves in a folder.
SAVED_TO_DISK = ("dataset_info.json", "dataset_dict.json")
# Descriptions of a dataset, which hold no rows of it.
NO_ROWS = (*SAVED_TO_DISK, "dataset_infos.json", "state.json")


def expand_files(name: str, split: str) -> list[Path]:
    """The files of a path, a pattern or a folder, sorted.

    Of a folder the JSONL files that are named after the split; all for the split ``train``, if none is.

    Raises:
        ValueError: there are none.
    """
    path = Path(name)
    if path.is_dir():
        files = _lines_of(path)
        of_split = _of_split(files, split)
        if files and not of_split and split != "train":
            raise ValueError(
                f"data.train={name!r} has no file {split}*.jsonl for data.train_split={split!r}, but "
                f"{', '.join(p.name for p in files[:5])}; name a split it has, or the files"
            )
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
    return not saved and bool(_lines_of(path))


def _lines_of(folder: Path) -> list[Path]:
    """Its files of JSON lines, sorted."""
    return sorted(p for p in folder.iterdir() if is_lines(p) and p.is_file() and p.name not in NO_ROWS)


def _of_split(files: list[Path], split: str) -> list[Path]:
    return [p for p in files if re.match(rf"{re.escape(split)}[-._]", p.name)]


def suffix(path: str | Path) -> str:
    """The last suffix of a path in lower case, with its dot."""
    return Path(path).suffix.lower()


def is_lines(path: Path) -> bool:
    """Whether a file's name says that it holds JSON lines, compressed or not."""
    return suffix(path.with_suffix("") if suffix(path) in COMPRESSIONS else path) in _JSONL


def is_table(name: str) -> bool:
    """Whether a file's name says that it is one of :data:`TABLES`."""
    return suffix(name) in TABLES


def check_kind(name: str, split: str = "train") -> None:
    """Raises: ValueError: a file that is there, or one beside the JSONL files of a folder, is of a kind that is not
    read; or a folder has the rows of the split in JSONL files and in tables."""
    if Path(name).is_dir():
        _check_one_kind(Path(name), split)
        folder = is_jsonl(name)
        files = [p for p in sorted(Path(name).iterdir()) if folder and suffix(p) in _COMPRESSED and not is_lines(p)]
    else:
        there = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
        files = [p for p in there if p.is_file() and not is_lines(p) and suffix(p) not in TABLES]
    if files:
        remedy = "unpack it first" if suffix(files[0]) in _COMPRESSED else "convert it to JSONL"
        read = ", ".join([*_JSONL, ".jsonl.gz", ".jsonl.zst", *TABLES])
        raise ValueError(f"data.train={name!r}: {files[0]} is no file of a kind that is read ({read}); {remedy}")


def check_config(names: Sequence[str], config: str | None) -> None:
    """Raises: ValueError: ``data.train_name``, the configuration of a dataset, beside files, which have none."""
    if config is not None and (all(map(is_jsonl, names)) or all(map(is_table, names))):
        raise ValueError(
            f"data.train_name={config!r} is a configuration of a dataset, and data.train={', '.join(names)} names "
            "files; leave out data.train_name"
        )


def _check_one_kind(folder: Path, split: str) -> None:
    """Raises: ValueError: JSONL files and tables, of which only one kind would be read. A .txt file may be a README."""
    lines = _lines_of(folder) if is_jsonl(str(folder)) else []
    tables = sorted(p for p in folder.iterdir() if is_table(p.name) and suffix(p) != ".txt")
    if lines and tables and (_of_split(tables, split) or not _of_split(lines, split)):
        raise ValueError(
            f"data.train={str(folder)!r} holds JSONL files ({lines[0].name}) and tables ({tables[0].name}); name the "
            "files of one kind (a pattern such as *.jsonl), or each kind in an entry of data.datasets"
        )
