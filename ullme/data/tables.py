"""Rows of Parquet, Arrow, CSV and text files, of folders and of the hub, by ``datasets``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.data.files import SAVED_TO_DISK, is_table
from ullme.data.table_files import CELLS, TableError, files_of, reading

if TYPE_CHECKING:
    from datasets import Dataset


def load(path: str | Sequence[str], name: str | None, split: str, cache_dir: str | None = None) -> Dataset:
    """Load a dataset with the ``datasets`` library.

    Args:
        path: see :class:`ullme.data.sources.HubSource`.
        name: its configuration, if it has several.
        split: of it.
        cache_dir: see :func:`ullme.data.table_files.reading`.

    Raises:
        ValueError: it cannot be loaded, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk
    from datasets.exceptions import DatasetsError

    files = [path] if isinstance(path, str) else list(path)
    try:
        if all(map(is_table, files)):
            return _load_tables(files, split, cache_dir)
        if any((Path(files[0]) / marker).exists() for marker in SAVED_TO_DISK):
            saved = load_from_disk(files[0])
            if not isinstance(saved, DatasetDict):
                return saved
            if split not in saved:
                raise ValueError(f"it has the splits {sorted(saved)}")
            return saved[split]
        return _load_repository(files[0], name, split, cache_dir)
    except TableError as error:
        raise ValueError(f"data.train: {error}") from None
    except PermissionError as error:
        raise ValueError(
            f"data.train={path!r}: the datasets library cannot write its cache ({error}); set HF_HOME (or "
            "HF_DATASETS_CACHE) to a folder that can be written"
        ) from error
    except (FileNotFoundError, ConnectionError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"data.train={path!r}, data.train_split={split!r}, data.train_name={name!r} cannot be loaded "
            f"({_reason(error)}); name a JSONL file, a folder or a dataset that can be reached, and a split it has"
        ) from error


def _load_tables(files: Sequence[str], split: str, cache_dir: str | None) -> Dataset:
    """Files or patterns. Raises: TableError: they do not go together, or are damaged."""
    from datasets import load_dataset

    kind, found, options = reading(files, cache_dir)
    return load_dataset(kind, data_files={split: found}, split=split, **options)


def _reason(error: BaseException) -> str:
    """What is wrong, in one line; ``datasets`` says no more than that an error occurred, and has the reason behind."""
    while type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:300]} ... {text[-90:]}"


def _load_repository(path: str, name: str | None, split: str, cache_dir: str | None) -> Dataset:
    """A dataset of the hub or a dataset folder; where a script would have to load it, its data files are read instead.

    ``datasets`` runs no loading scripts since 4.0, and Tevatron/msmarco-passage, the default training set, has one.

    Raises:
        ValueError: only a script can load it.
    """
    from datasets import load_dataset

    options: dict[str, Any] = {}
    if (builder := _table_builder(path, name)) is not None:
        if name is None and Path(path).is_dir() and (files := files_of(builder, split)):
            return _load_tables(files, split, cache_dir)
        if _is_csv(builder):
            options = {**CELLS, "index_col": False}
    try:
        with warnings.catch_warnings():
            # a row with more cells than the header, which would otherwise lose its first cell or its last
            warnings.filterwarnings("error", "Length of header or names does not match length of data")
            return load_dataset(path, name, split=split, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        reason = "a script loads it, which the installed version of datasets does not run"
        if name is not None:
            raise ValueError(f"{reason}; leave out data.train_name to read its files") from error
        if not (files := _json_files(path, split)):
            raise ValueError(f"{reason}, and it has no file {split}*.jsonl or {split}*.jsonl.gz") from error
    return load_dataset("json", data_files={split: files}, split=split)


def _table_builder(path: str, name: str | None) -> Any:
    """The builder of ``datasets`` for a folder or a hub dataset of CSV or Parquet files; None for others."""
    from datasets import load_dataset_builder
    from datasets.packaged_modules.parquet.parquet import Parquet

    try:
        builder = load_dataset_builder(path, name)
    except Exception:  # whatever is wrong with it, loading it says so
        return None
    return builder if _is_csv(builder) or isinstance(builder, Parquet) else None


def _is_csv(builder: Any) -> bool:
    from datasets.packaged_modules.csv.csv import Csv

    return isinstance(builder, Csv)


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
