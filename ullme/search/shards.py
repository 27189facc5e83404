"""Embeddings of a corpus on disk: shards of vectors with their documents, and a manifest.

A folder holds ``manifest.json`` and, for each shard ``shard-00000``:

- ``shard-00000.npy``: (n, D) vectors in float32, float16 or int8, which numpy maps into memory;
- ``shard-00000.scales.npy``: only with int8, (n,) float32 factors of the rows;
- ``shard-00000.ids.npy``: (n,) ids in UTF-8;
- ``shard-00000.jsonl``: ``_id`` and ``text`` of each document, one a line;
- ``shard-00000.json``: size and SHA-256 of these files, written last. A shard without it does not exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from ullme.search.corpus import Document
from ullme.utils import atomic_files

Precision = Literal["float32", "float16", "int8"]

MANIFEST = "manifest.json"
FORMAT = 1
# Rows that are read at once.
BLOCK_ROWS = 16_384

# What must be equal for two commands to write into one folder: key of the manifest -> its name in messages.
_SETTINGS = {
    "role": "--role",
    "prompts": "the prompts",
    "instruction": "--instruction",
    "max_length": "--max_length",
    "precision": "--precision",
    "truncate_dim": "--truncate_dim",
    "similarity": "the similarity",
    "model": "the model",
    "dimensions": "the number of dimensions",
    "corpus": "--corpus (or its --id_column, --text_columns or --on_empty)",
    "plan": "--shard_rows",
}


def shard_name(number: int) -> str:
    """``shard-00000``."""
    return f"shard-{number:05d}"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a new folder, or check that the one that is there is of the same embeddings.

    Returns:
        The manifest in the folder.

    Raises:
        ValueError: the folder holds embeddings of another model, prompt, corpus or setting, or other files.
    """
    if (folder / MANIFEST).exists():
        there = read_manifest(folder)
        for key, option in _SETTINGS.items():
            if _compared(there, key) != _compared(manifest, key):
                _refuse(folder, option, _shown(there, key), _shown(manifest, key))
        return there
    check_folder(folder)
    _write_json(folder / MANIFEST, manifest)
    return manifest


def check_folder(folder: Path) -> None:
    """Raises: ValueError: a file, or a folder with files but no manifest, to which no shards are written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--to {folder} is a file; name a new folder")
    if (folder / MANIFEST).exists() or not folder.is_dir():
        return
    if others := [p.name for p in sorted(folder.iterdir()) if not p.name.startswith(".")]:
        raise ValueError(f"--to {folder} has no {MANIFEST}, but holds {others[0]}; name a new or an empty folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: ValueError: there is none, it is damaged, or of a newer version of ullme."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except OSError:
        raise ValueError(f"{folder} has no {MANIFEST}; give a folder that `ullme encode --to` wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run `ullme encode` again") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, and this version of ullme reads {FORMAT}; update ullme")
    return content


def _compared(manifest: dict[str, Any], key: str) -> Any:
    """A part of a manifest as it is compared: a model is its revision, a corpus its content."""
    if key == "model":
        return manifest[key]["revision"]
    if key == "corpus":
        return manifest[key]["sha256"]
    if key == "plan":
        return [shard["rows"] for shard in manifest["shards"]]
    return manifest[key]


def _shown(manifest: dict[str, Any], key: str) -> Any:
    """A part of a manifest for messages."""
    part: Any = manifest.get(key)
    if key == "model":
        return f"{part['name']}, revision {part['revision']}"
    if key == "corpus":
        return f"{part['name']} with {part['documents']} documents, SHA-256 {part['sha256'][:12]}"
    return manifest["shards"][0]["rows"] if key == "plan" else part


def _refuse(folder: Path, option: str, there: Any, here: Any) -> None:
    """Raises: ValueError: always; of mappings the first field that differs is named."""
    if isinstance(there, dict) and isinstance(here, dict):
        field = next(key for key in sorted({*there, *here}) if there.get(key) != here.get(key))
        option, there, here = f"{option}, field {field}", there.get(field), here.get(field)
    raise ValueError(
        f"--to {folder} holds embeddings of another command: {option} was {there!r} and is {here!r} now; give another "
        "folder, or the same model, prompts, corpus and options to go on there"
    )


def write_shard(folder: Path, number: int, vectors: np.ndarray, documents: Sequence[Document], precision: str) -> None:
    """Write a shard: its files first, each under its name only when it is whole, then the record that makes it count.

    Args:
        folder: with the manifest.
        number: of the shard, from 0.
        vectors: (n, D) float32.
        documents: the n documents.
        precision: float32, float16 or int8, see :func:`quantized`.

    Raises:
        ValueError: a vector is not finite, or the disk is full.
    """
    arrays = {}
    if precision == "int8":
        arrays["npy"], arrays["scales.npy"] = quantized(vectors)
        finite = np.isfinite(arrays["scales.npy"])
    else:
        with np.errstate(over="ignore"):  # reported below
            arrays["npy"] = np.ascontiguousarray(vectors, dtype=precision)
        finite = np.isfinite(arrays["npy"]).all(axis=1)
    if not finite.all():
        first = documents[int(np.argmin(finite))].id
        raise ValueError(
            f"the embedding of document {first!r} is not finite in {precision}; write --precision float32, or load the "
            "model with --dtype float32"
        )
    arrays["ids.npy"] = np.array([document.id.encode() for document in documents])
    name = shard_name(number)
    files = {}
    for kind, array in arrays.items():
        files[f"{name}.{kind}"] = _write(folder / f"{name}.{kind}", partial(_write_array, array=array))
    files[f"{name}.jsonl"] = _write(folder / f"{name}.jsonl", partial(_write_documents, documents=documents))
    _write_json(folder / f"{name}.json", {"rows": len(documents), "files": files})


class _HashingFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self.sha256.update(data)
        return self.file.write(data)


def _write(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Write a file and return its size and hash."""
    sinks = []

    def hashed(file: BinaryIO) -> None:
        sinks.append(_HashingFile(file))
        write(sinks[-1])

    atomic_files.write_atomically(path, hashed, "--to")
    return {"bytes": sinks[0].bytes, "sha256": sinks[0].sha256.hexdigest()}


def _write_array(sink: Any, array: np.ndarray) -> None:
    np.save(sink, array, allow_pickle=False)


def _write_documents(sink: _HashingFile, documents: Sequence[Document]) -> None:
    for document in documents:
        sink.write(json.dumps({"_id": document.id, "text": document.text}, ensure_ascii=False).encode() + b"\n")


def quantized(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row in int8, scaled so that its largest component becomes 127.

    Args:
        vectors: (n, D) float32.

    Returns:
        (n, D) int8 codes and (n,) float32 scales; ``codes * scales[:, None]`` is ``vectors`` to within half a scale.
    """
    scales = (np.abs(vectors).max(axis=1) / 127).astype(np.float32)
    codes = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
    return codes.astype(np.int8), scales


def missing_shards(folder: Path, numbers: Sequence[int]) -> list[int]:
    """Of these shards those that are not there, or of which a file has not the size that was recorded."""
    return [number for number in numbers if find_damage(folder, number) is not None]


def find_damage(folder: Path, number: int, hashes: bool = False) -> str | None:
    """What is wrong with a shard; None where nothing is.

    Args:
        folder: with the manifest.
        number: of the shard.
        hashes: compare the files' SHA-256 too, which reads them.
    """
    record = folder / f"{shard_name(number)}.json"
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"].items()
    except OSError:
        return f"{record.name} is missing"
    except (ValueError, KeyError, AttributeError):
        return f"{record.name} is damaged"
    for name, known in files:
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != known["bytes"]:
            return f"{name} has {size} bytes instead of {known['bytes']}"
        if hashes and _sha256(folder / name) != known["sha256"]:
            return f"{name} has other content than was written (its SHA-256 differs)"
    return None


def finish(folder: Path) -> bool:
    """Write the hashes of all shards into the manifest, if all are there.

    Every worker calls this at its end; the last finds them all. Two that do so at once write the same.

    Returns:
        Whether all shards are there.
    """
    manifest = read_manifest(folder)
    if missing_shards(folder, range(len(manifest["shards"]))):
        return False
    for number, shard in enumerate(manifest["shards"]):
        record = json.loads((folder / f"{shard_name(number)}.json").read_text(encoding="utf-8"))
        shard["files"] = record["files"]
    _write_json(folder / MANIFEST, manifest)
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    atomic_files.write_text(path, text, "--to")


class Shards:
    """The embeddings of a corpus in a folder of ``ullme encode``, mapped into memory.

    Rows are numbered over all shards, in the order of the corpus.

    Args:
        folder: that ``ullme encode --to`` wrote.
        check_hashes: read every file and compare its SHA-256.

    Raises:
        ValueError: no such folder, shards that are missing, truncated or of another run of ``ullme encode``.
    """

    def __init__(self, folder: str | Path, check_hashes: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.sizes = [shard["rows"] for shard in self.manifest["shards"]]
        damaged = {n: why for n in range(len(self.sizes)) if (why := find_damage(self.folder, n, check_hashes))}
        if damaged:
            raise ValueError(
                f"{folder}: {len(damaged)} of {len(self.sizes)} shards are missing or damaged (first: "
                f"{next(iter(damaged.values()))}); the same `ullme encode` command writes them"
            )
        if any("files" not in shard for shard in self.manifest["shards"]):
            finish(self.folder)
            self.manifest = read_manifest(self.folder)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def __len__(self) -> int:
        """The number of documents."""
        return int(self.starts[-1])

    @property
    def dimensions(self) -> int:
        """D."""
        return self.manifest["dimensions"]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the recorded hashes of all shards: an index of these shards, and of no others, has it."""
        return hashlib.sha256(json.dumps(self.manifest["shards"], sort_keys=True).encode()).hexdigest()

    def blocks(self, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """Stream all vectors: (number of the first row, (n, D) float32) with n at most ``block_rows``."""
        for number, start in enumerate(self.starts[:-1]):
            size = self.sizes[number]
            for low in range(0, size, block_rows):
                yield int(start) + low, self._decoded(number, slice(low, min(low + block_rows, size)))

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, D) float32 vectors of n rows."""
        out = np.empty((len(rows), self.dimensions), dtype=np.float32)
        for number, inside, places in self._by_shard(rows):
            out[places] = self._decoded(number, inside)
        return out

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of rows."""
        out = [""] * len(rows)
        for number, inside, places in self._by_shard(rows):
            for place, key in zip(places.tolist(), self._array(number, "ids.npy")[inside].tolist(), strict=True):
                out[place] = key.decode()
        return out

    def documents(self, rows: Sequence[int] | np.ndarray) -> list[Document]:
        """The documents of rows, read from the disk."""
        out: list[Any] = [None] * len(rows)
        for number, inside, places in self._by_shard(rows):
            begins = self._line_begins(number)
            with self._path(number, "jsonl").open("rb") as file:
                for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                    file.seek(int(begins[row]))
                    out[place] = _parsed(file.readline())
        return out

    def all_documents(self) -> Iterator[Document]:
        """Stream all documents, in the order of the corpus."""
        for number in range(len(self.sizes)):
            with self._path(number, "jsonl").open("rb") as file:
                yield from map(_parsed, file)

    def all_ids(self) -> Iterator[str]:
        """Stream all ids, in the order of the corpus."""
        for number in range(len(self.sizes)):
            for key in self._array(number, "ids.npy").tolist():
                yield key.decode()

    def _by_shard(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each shard with some of the rows: its number, their numbers in it, and their places in ``rows``."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows must be 0 to {len(self) - 1}")
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        for number in np.unique(owner).tolist():
            places = np.flatnonzero(owner == number)
            yield number, wanted[places] - self.starts[number], places

    def _decoded(self, number: int, rows: slice | np.ndarray) -> np.ndarray:
        vectors = self._array(number, "npy")[rows].astype(np.float32)
        if self.manifest["precision"] == "int8":
            vectors *= self._array(number, "scales.npy")[rows][:, None]
        return vectors

    def _array(self, number: int, kind: str) -> np.ndarray:
        return np.load(self._path(number, kind), mmap_mode="r", allow_pickle=False)

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{shard_name(number)}.{kind}"

    @lru_cache(maxsize=64)  # noqa: B019 - a folder is opened once in a process
    def _line_begins(self, number: int) -> np.ndarray:
        """(n,) the byte at which each document's line begins."""
        content = np.memmap(self._path(number, "jsonl"), dtype=np.uint8, mode="r")
        return np.concatenate([[0], np.flatnonzero(content == ord("\n"))[:-1] + 1])


def _parsed(line: bytes) -> Document:
    row = json.loads(line)
    return Document(row["_id"], row["text"])


def check_precision(precision: str) -> None:
    """Raises: ValueError: it is none that shards are written in."""
    if precision not in get_args(Precision):
        raise ValueError(f"--precision {precision}: choose {', '.join(get_args(Precision))}")
