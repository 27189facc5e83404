"""Encode a corpus: one shard after the other, each a function of its documents and the model alone.

A shard is embedded by itself, so that every worker of any engine (one process, torchrun, a SLURM array, Ray) writes the
same bytes for it, and a command that was stopped writes those that are missing.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ullme.prompts import Role
from ullme.search import shards
from ullme.search.corpus import SHARD_ROWS, Corpus, CorpusPlan, check_corpus
from ullme.search.embedder import TextEmbedder, check_instruction
from ullme.utils import atomic_files


@dataclass(frozen=True)
class EncodeSettings:
    """How a corpus is embedded and stored.

    Args:
        role: "passage" or "query": which prompt template.
        instruction: in place of the prompt contract's.
        max_length: in tokens, template included; None is 512, or a sentence-transformers model's own.
        precision: of the stored vectors: float32, float16 or int8.
        truncate_dim: keep this many leading components; None keeps all.
        batch_size: as for ``ULLME.encode``; it changes no more than the last bits of an embedding.
    """

    role: Role = "passage"
    instruction: str | None = None
    max_length: int | None = None
    precision: shards.Precision = "float32"
    truncate_dim: int | None = None
    batch_size: int | None = None

    def check(self) -> None:
        """Raises: ValueError: a value out of range."""
        shards.check_precision(self.precision)
        if self.role not in ("passage", "query"):
            raise ValueError(f"--role {self.role}: choose passage or query")
        for name in ("max_length", "truncate_dim", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")


@dataclass(frozen=True)
class Encoded:
    """What :func:`encode_corpus` did.

    Args:
        written: numbers of the shards that it wrote.
        finished: whether the folder holds every shard now.
        plan: the corpus.
    """

    written: list[int]
    finished: bool
    plan: CorpusPlan


def encode_corpus(
    embedder: TextEmbedder,
    corpus: Corpus,
    folder: str | Path,
    settings: EncodeSettings | None = None,
    *,
    model_name: str = "",
    model_options: dict[str, Any] | None = None,
    shard_rows: int = SHARD_ROWS,
    plan: CorpusPlan | None = None,
    part: tuple[int, int] = (0, 1),
    show_progress_bar: bool = False,
) -> Encoded:
    """Embed a corpus into a folder of shards; the same call again writes those that are missing.

    Args:
        embedder: the model.
        corpus: the documents.
        folder: new, empty, or of an earlier call with the same model, corpus and settings.
        settings: how to embed and store.
        model_name: under which ``ullme search`` loads the model again.
        model_options: with which it loads it.
        shard_rows: documents in a shard.
        plan: the corpus's, by :func:`~ullme.search.corpus.check_corpus`; None checks it here.
        part: (i, n) writes the shards i, i + n, i + 2n ...; the workers of one folder have i from 0 to n - 1.
        show_progress_bar: show a bar on stderr.

    Raises:
        ValueError: a bad document, a folder of other embeddings, or a disk that cannot be written.
    """
    settings = settings or EncodeSettings()
    folder = Path(folder)
    plan = plan or check_corpus(corpus, shard_rows)
    settings = begin(embedder, corpus, plan, folder, settings, model_name, model_options)
    mine = list(range(part[0], len(plan.shards), part[1]))
    remove_unfinished(folder, mine, part[0] == 0)
    missing = shards.missing_shards(folder, mine)
    with progress_bar(plan, missing, show_progress_bar) as bar:
        for number in missing:
            encode_shard(embedder, corpus, plan, folder, settings, number, bar.update)
    return Encoded(missing, shards.finish(folder), plan)


def begin(
    embedder: TextEmbedder,
    corpus: Corpus,
    plan: CorpusPlan,
    folder: Path,
    settings: EncodeSettings,
    model_name: str = "",
    model_options: dict[str, Any] | None = None,
) -> EncodeSettings:
    """Write the folder's manifest, or compare it with the one that is there.

    Returns:
        The settings, with the model's max_length where none was given.

    Raises:
        ValueError: a value out of range, or a folder of other embeddings.
    """
    settings.check()
    check_instruction(embedder.prompts, settings.role, settings.instruction)
    if settings.truncate_dim is not None and settings.truncate_dim > embedder.dimensions:
        raise ValueError(
            f"--truncate_dim {settings.truncate_dim}: the model has {embedder.dimensions} dimensions; give fewer"
        )
    max_length = settings.max_length or embedder.default_max_length
    settings = EncodeSettings(**{**asdict(settings), "max_length": max_length})
    stored = {key: value for key, value in asdict(settings).items() if key != "batch_size"}
    manifest = {
        "format": shards.FORMAT,
        "model": {
            "name": model_name,
            "kind": embedder.kind,
            "revision": embedder.revision(),
            "options": model_options or {},
        },
        "prompts": embedder.prompts,
        **stored,
        "similarity": embedder.similarity,
        "dimensions": settings.truncate_dim or embedder.dimensions,
        "corpus": {"name": corpus.name, "documents": plan.documents, "sha256": plan.sha256},
        "shards": [{"name": shards.shard_name(n), "rows": shard.rows} for n, shard in enumerate(plan.shards)],
    }
    shards.write_manifest(folder, manifest)
    return settings


def encode_shard(
    embedder: TextEmbedder,
    corpus: Corpus,
    plan: CorpusPlan,
    folder: Path,
    settings: EncodeSettings,
    number: int,
    on_batch: Any = None,
) -> None:
    """Embed and write one shard. Raises: ValueError: see :func:`encode_corpus`."""
    assert settings.max_length is not None  # begin() has set it
    first = sum(shard.rows for shard in plan.shards[:number])
    documents = corpus.read(plan.shards[number], first)
    vectors = embedder.embed(
        [document.text for document in documents],
        settings.role,
        instruction=settings.instruction,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        truncate_dim=settings.truncate_dim,
        on_batch=on_batch,
    )
    shards.write_shard(folder, number, vectors, documents, settings.precision)


def remove_unfinished(folder: Path, numbers: list[int], manifest: bool) -> None:
    """Remove what a killed process left of these shards. Other workers' files stay: they may run on other hosts."""
    for number in numbers:
        atomic_files.sweep(folder, f"*.{shards.shard_name(number)}.*")
    if manifest:
        atomic_files.sweep(folder, f"*.{shards.MANIFEST}")


def progress_bar(plan: CorpusPlan, missing: list[int], show: bool) -> Any:
    """A bar of documents, of which those of the other shards are there already."""
    from tqdm.auto import tqdm

    rows = sum(plan.shards[number].rows for number in missing)
    return tqdm(total=plan.documents, initial=plan.documents - rows, unit="document", desc="encode", disable=not show)


def own_part(shard: str | None) -> tuple[int, int]:
    """Which shards this process writes, from ``--shard I/N`` and torchrun's environment.

    Raises:
        ValueError: not two numbers I/N with I from 0 to N - 1.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if shard is None:
        return rank, ranks
    number, _, of = shard.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise ValueError(
            f"--shard {shard}: give I/N, two numbers with I from 0 to N - 1, such as 0/8 (for a SLURM array "
            "$SLURM_ARRAY_TASK_ID/8)"
        )
    return int(number) * ranks + rank, int(of) * ranks


def local_device() -> str | None:
    """The GPU of this process of torchrun; None where there is one process, or no GPU."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
