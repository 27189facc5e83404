"""Encode a corpus on a Ray cluster with Ray Data: it schedules the shards, retries them, and adds workers as it grows.

An actor loads the model once, and writes one shard at a time by the same function as the local engine, so the shards
are the same. The folder, the corpus and the model must be readable under the same names on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ullme.search import shards
from ullme.search.corpus import Corpus, CorpusPlan
from ullme.search.corpus_readers import JsonlReader, ParquetReader
from ullme.search.embedder import TextEmbedder
from ullme.search.encode import Encoded, EncodeSettings, begin, encode_shard, progress_bar, remove_unfinished

# Loads the model in an actor, on the device that Ray gave it: the embedder, and the options to load it with again.
Load = Callable[[], tuple[TextEmbedder, dict[str, Any]]]


@dataclass(frozen=True)
class ActorPool:
    """The workers that Ray starts.

    Args:
        address: of the cluster; None takes $RAY_ADDRESS, a cluster on this machine, or starts one here.
        size: actors at the most; None takes as many as the cluster has room for.
        cpus: of each actor.
        gpus: of each actor, may be a fraction; None takes 1 if the cluster has GPUs, else 0.
    """

    address: str | None = None
    size: int | None = None
    cpus: int = 1
    gpus: float | None = None

    def check(self) -> None:
        """Raises: ValueError: a value out of range."""
        for name, value, least in (
            ("actors", self.size, 1),
            ("actor_cpus", self.cpus, 1),
            ("actor_gpus", self.gpus, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"--{name} {value} must be at least {least}")


def encode_corpus_on_ray(
    load: Load,
    corpus: Corpus,
    plan: CorpusPlan,
    folder: str | Path,
    settings: EncodeSettings,
    *,
    model_name: str = "",
    pool: ActorPool | None = None,
    show_progress_bar: bool = False,
) -> Encoded:
    """As :func:`~ullme.search.encode.encode_corpus`, by the actors of a Ray cluster.

    Args:
        load: loads the model in each actor; pickled, so a function of a module.
        corpus: the documents.
        plan: the corpus's, by :func:`~ullme.search.corpus.check_corpus`.
        folder: on a file system that all machines share.
        settings: how to embed and store.
        model_name: under which ``ullme search`` loads the model again.
        pool: the workers.
        show_progress_bar: show a bar on stderr.

    Raises:
        ValueError: Ray is not installed, there is no such cluster or it has no room for an actor; or what
            :func:`~ullme.search.encode.encode_corpus` raises, in an actor.
    """
    ray, pool, folder = import_ray(), pool or ActorPool(), Path(folder).absolute()
    settings.check()
    pool.check()
    every = list(range(len(plan.shards)))
    missing = shards.missing_shards(folder, every)
    _connect(ray, pool)
    if missing or not (folder / shards.MANIFEST).exists():
        worker = (load, _absolute(corpus), plan, folder, settings, model_name)
        with progress_bar(plan, missing, show_progress_bar) as bar:
            for documents in _written(ray, worker, missing, _with_gpus(ray, pool)):
                bar.update(documents)
    remove_unfinished(folder, every, True)  # of actors that died
    return Encoded(missing, shards.finish(folder), plan)


class ShardWriter:
    """An actor: the model, and what it writes. Errors are returned as text, so that Ray does not wrap or retry them."""

    def __init__(
        self, load: Load, corpus: Corpus, plan: CorpusPlan, folder: Path, settings: EncodeSettings, model_name: str
    ) -> None:
        self.corpus, self.plan, self.folder, self.error = corpus, plan, folder, ""
        try:
            self.embedder, model_options = load()
            self.settings = begin(self.embedder, corpus, plan, folder, settings, model_name, model_options)
        except ValueError as error:
            self.error = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Write the shard whose number is the batch's only row; returns how many documents it has, or the error."""
        (number,) = batch["shard"].tolist()
        try:
            if not self.error:
                encode_shard(self.embedder, self.corpus, self.plan, self.folder, self.settings, number)
        except ValueError as error:
            self.error = str(error)
        return {"documents": [self.plan.shards[number].rows], "error": [self.error]}


def _written(ray: Any, worker: tuple[Any, ...], missing: list[int], pool: ActorPool) -> Iterator[int]:
    """Write shards; yields the number of documents of each that is there. Raises: ValueError: an actor's."""
    from ray import data

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    size = min(pool.size or len(missing), len(missing))
    found = data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing)).map_batches(
        ShardWriter,
        batch_size=1,
        fn_constructor_args=worker,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        # few, since a shard is minutes of work; with 1 Ray Data would never start a second actor
        compute=data.ActorPoolStrategy(min_size=1, max_size=size, max_tasks_in_flight_per_actor=2),
    )
    for row in found.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        yield row["documents"]


def _connect(ray: Any, pool: ActorPool) -> None:
    """Join the cluster. Raises: ValueError: there is none at the address."""
    if ray.is_initialized():
        return
    try:
        ray.init(pool.address, logging_level="warning", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--ray_address {pool.address}: no Ray cluster can be reached there ({error}); start one with `ray start "
            "--head`, or leave the option out to start one on this machine"
        ) from None


def _with_gpus(ray: Any, pool: ActorPool) -> ActorPool:
    """The pool with its number of GPUs. Raises: ValueError: no machine of the cluster has room for an actor."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = (1.0 if any(node.get("GPU") for node in nodes) else 0.0) if pool.gpus is None else pool.gpus
    if not any(node.get("CPU", 0) >= pool.cpus and node.get("GPU", 0) >= gpus for node in nodes):
        has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(
            f"--actor_cpus {pool.cpus} --actor_gpus {gpus:g}: no machine of the cluster has as many ({has}); give fewer"
        )
    return replace(pool, gpus=gpus)


def _absolute(corpus: Corpus) -> Corpus:
    """The corpus with absolute paths, since actors run in other folders. Its name stays: the manifest holds it."""
    reader = corpus.reader
    if isinstance(reader, JsonlReader):
        return replace(corpus, reader=JsonlReader([path.absolute() for path in reader.files]))
    if isinstance(reader, ParquetReader):
        return replace(corpus, reader=ParquetReader([path.absolute() for path in reader.files], corpus.columns))
    return corpus


def import_ray() -> Any:
    """Raises: ValueError: it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError(
            "--engine ray: Ray is not installed: pip install 'ullme[ray]', or leave --engine out to encode here"
        ) from None
    return ray
