"""A FAISS index over the shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ullme.search import index_files
from ullme.search.shards import Shards
from ullme.search.topk import exact_top_k
from ullme.utils.progress import progress

FOLDER = "faiss"
_FILE = "index.faiss"
# Vectors that train an index, at the most.
TRAIN_ROWS = 200_000


class FaissIndex:
    """An open index.

    Args:
        shards: that it is of.
        description: what index.json says.
    """

    def __init__(self, shards: Shards, description: dict[str, Any]) -> None:
        faiss = import_faiss()
        self.description = description
        path = str(shards.folder / FOLDER / _FILE)
        try:
            self._index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read ({error}); run `ullme index {shards.folder}` again") from None
        _set_parameters(self._index, description["parameters"])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) float32 scores and (Q, k) int64 rows; -inf and -1 where the index finds fewer."""
        scores, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        scores[rows < 0] = -np.inf
        return scores, rows


def open_index(shards: Shards) -> FaissIndex | None:
    """The index beside the shards, mapped into memory; None if there is none.

    Raises:
        ValueError: it is damaged, of other shards, or FAISS is not installed.
    """
    description = index_files.read_description(shards, FOLDER)
    return None if description is None else FaissIndex(shards, description)


def build_index(
    shards: Shards, factory: str = "Flat", parameters: str = "", train_rows: int = TRAIN_ROWS, seed: int = 0
) -> FaissIndex:
    """Build an index and write it beside the shards.

    Args:
        shards: to index.
        factory: for ``faiss.index_factory``: Flat, HNSW32, "IVF4096,PQ64" ...
        parameters: how it is searched, for ``faiss.ParameterSpace``: "nprobe=32", "efSearch=200" ...
        train_rows: so many vectors, drawn at random, train an index that needs it.
        seed: of the draw.

    Raises:
        ValueError: FAISS is not installed, does not know the factory or a parameter, or needs more vectors to train.
    """
    faiss = import_faiss()
    try:
        index = faiss.index_factory(shards.dimensions, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"--factory {factory}: FAISS cannot make it ({_reason(error)}); give a string of its index_factory, "
            "such as Flat, HNSW32 or IVF1024,Flat"
        ) from None
    _set_parameters(index, parameters)
    if not index.is_trained:
        rows = np.random.default_rng(seed).choice(len(shards), min(train_rows, len(shards)), replace=False)
        try:
            index.train(shards.vectors(np.sort(rows)))
        except RuntimeError as error:
            raise ValueError(
                f"--factory {factory} cannot be trained on {len(rows)} vectors ({_reason(error)}); give one with fewer "
                "clusters or bits"
            ) from None
    with progress("indexing", total=len(shards), unit="document") as bar:
        for first, vectors in shards.blocks():
            _add(index, factory, first, vectors)
            bar.update(len(vectors))

    def write(folder: Path) -> dict[str, Any]:
        # FAISS's own file prints an error of the last write and goes on
        with (folder / _FILE).open("wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
            file.flush()
            os.fsync(file.fileno())
        return {"factory": factory, "parameters": parameters, "faiss": faiss.__version__}

    index_files.write_index(shards, FOLDER, write)
    opened = open_index(shards)
    assert opened is not None
    return opened


def _add(index: Any, factory: str, first: int, vectors: np.ndarray) -> None:
    """Add the vectors of consecutive rows. Raises: ValueError: the index takes none."""
    faiss = import_faiss()
    try:
        if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):  # it has no numbers of its own
            index.add_with_ids(vectors, np.arange(first, first + len(vectors), dtype=np.int64))
        else:
            index.add(vectors)
    except RuntimeError as error:
        raise ValueError(
            f"--factory {factory}: FAISS cannot add vectors to it ({_reason(error)}); give another one, such as "
            "Flat, HNSW32 or IVF1024,Flat"
        ) from None


def sample_queries(shards: Shards, number: int, seed: int = 0) -> np.ndarray:
    """Vectors of documents, drawn at random, in place of queries."""
    rows = np.random.default_rng(seed).choice(len(shards), min(number, len(shards)), replace=False)
    return shards.vectors(np.sort(rows))


def recall(index: FaissIndex, shards: Shards, queries: np.ndarray, k: int = 100, device: str = "cpu") -> float:
    """The share of exact search's k best documents that the index finds among its k best, mean over queries.

    Args:
        index: to measure.
        shards: that it is of.
        queries: (Q, D) float32.
        k: at most the number of documents.
        device: of exact search.
    """
    k = min(k, len(shards))
    found = index.search(queries, k)[1]
    true = exact_top_k(queries, shards.blocks(), k, device)[1]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, true, strict=True)]))


def _set_parameters(index: Any, parameters: str) -> None:
    """Raises: ValueError: FAISS does not know a parameter, or the index has no such one."""
    if parameters:
        try:
            import_faiss().ParameterSpace().set_index_parameters(index, parameters)
        except RuntimeError as error:
            raise ValueError(
                f"--parameters {parameters}: the index does not have it ({_reason(error)}); give for example nprobe=32 "
                "with IVF, efSearch=200 with HNSW"
            ) from None


def _reason(error: RuntimeError) -> str:
    """FAISS's message without the place in its source."""
    return str(error).rpartition(": ")[2].strip()


def import_faiss() -> Any:
    """Raises: ValueError: it is not installed."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "FAISS is not installed: pip install 'ullme[search]' (or faiss-gpu), or search without an index "
            "(ullme search --exact)"
        ) from None
    return faiss
