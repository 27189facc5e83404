"""Rows of Parquet, Arrow, CSV and text files, of folders and of the hub, by ``datasets``."""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.data.files import SAVED_TO_DISK, TABLES, is_table, suffix

if TYPE_CHECKING:
    from datasets import Dataset

# An empty cell of a CSV file has no value; the words None, NA and null are texts as any other.
_CELLS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}


def load(path: str | Sequence[str], name: str | None, split: str) -> Dataset:
    """Load a dataset with the ``datasets`` library. Raises: ValueError: it cannot be loaded, or has no such split."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    files = [path] if isinstance(path, str) else list(path)
    try:
        if all(map(is_table, files)):
            kind = suffix(files[0])
            return load_dataset(TABLES[kind], data_files={split: files}, split=split, **_reading(kind, files[0]))
        if any((Path(files[0]) / marker).exists() for marker in SAVED_TO_DISK):
            saved = load_from_disk(files[0])
            if not isinstance(saved, DatasetDict):
                return saved
            if split not in saved:
                raise ValueError(f"it has the splits {sorted(saved)}")
            return saved[split]
        return _load_repository(files[0], name, split)
    except PermissionError as error:
        raise ValueError(
            f"data.train={path!r}: the datasets library cannot write its cache ({error}); set HF_HOME (or "
            "HF_DATASETS_CACHE) to a folder that can be written"
        ) from error
    except (FileNotFoundError, ConnectionError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"data.train={path!r}, data.train_split={split!r}, data.train_name={name!r} cannot be loaded ({error}); "
            "name a JSONL file, a folder or a dataset that can be reached, and a split it has"
        ) from error


def _load_repository(path: str, name: str | None, split: str) -> Dataset:
    """A dataset of the hub or a dataset folder; where a script would have to load it, its data files are read instead.

    ``datasets`` runs no loading scripts since 4.0, and Tevatron/msmarco-passage, the default training set, has one.

    Raises:
        ValueError: only a script can load it.
    """
    from datasets import load_dataset

    try:
        return load_dataset(path, name, split=split, **_cell_options(path, name))
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        reason = "a script loads it, which the installed version of datasets does not run"
        if name is not None:
            raise ValueError(f"{reason}; leave out data.train_name to read its files") from error
        if not (files := _json_files(path, split)):
            raise ValueError(f"{reason}, and it has no file {split}*.jsonl or {split}*.jsonl.gz") from error
    return load_dataset("json", data_files={split: files}, split=split)


def _cell_options(path: str, name: str | None) -> dict[str, Any]:
    """For a folder or a hub dataset of CSV files, in which every cell is to be read as text; else none."""
    from datasets import load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv

    try:
        return _CELLS if isinstance(load_dataset_builder(path, name), Csv) else {}
    except Exception:  # whatever is wrong with it, loading it says so
        return {}


def _json_files(path: str, split: str) -> list[str]:
    """Paths or addresses of the files of JSON lines, compressed or not, that a folder or a dataset of the hub has for a
    split (train.jsonl, train-00001.jsonl.gz)."""
    from huggingface_hub import HfApi

    if Path(path).is_dir():
        found = {str(file.relative_to(path)): str(file) for file in Path(path).rglob("*")}
    else:
        found = {file: f"hf://datasets/{path}/{file}" for file in HfApi().list_repo_files(path, repo_type="dataset")}
    wanted = re.compile(rf"{re.escape(split)}([-._].*)?\.jsonl?(\.(gz|zst|xz|bz2))?")
    return [address for file, address in sorted(found.items()) if wanted.fullmatch(Path(file).name)]


def _reading(kind: str, file: str) -> dict[str, Any]:
    """Options of ``load_dataset`` for table files of a kind: every cell of a CSV or TSV file is a text."""
    from datasets import Features, Value

    if TABLES[kind] != "csv":
        return {}
    # Quotation marks of a TSV file are ordinary characters, as in the STS files of evaluation.
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
    first = next(iter(sorted(glob.glob(file, recursive=True))), file)
    with open(first, encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream, delimiter=options.get("sep", ","), quoting=options.get("quoting", 0)), [])
    return {**options, **_CELLS, "features": Features({column: Value("string") for column in header})}
