"""The model of a folder of embeddings: an ULLME, or a sentence-transformers model, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ullme.models import encoding
from ullme.models.revision import revision
from ullme.models.sentence_transformer_length import set_max_length
from ullme.prompts import Role

DEFAULT_MAX_LENGTH = 512

# Called with the number of texts of a batch that is embedded.
OnBatch = Callable[[int], None]


class TextEmbedder(Protocol):
    """Embeds queries and passages. What it is stands in the manifest of a folder of embeddings.

    Attributes:
        kind: "ullme" or "sentence-transformers".
        similarity: "cosine" (embeddings are normalised) or "dot".
        dimensions: D.
        prompts: the prompt contract, or a sentence-transformers model's prompts.
        default_max_length: in tokens, where the user gives none.
    """

    kind: str
    similarity: str
    dimensions: int
    prompts: dict[str, Any]
    default_max_length: int

    def revision(self) -> str:
        """A hash of all that embeddings depend on: weights, tokenizer, prompts and options."""
        ...

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        max_length: int,
        batch_size: int | None = None,
        truncate_dim: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> np.ndarray:
        """(R, D) float32 embeddings, in the order of the texts; D is ``truncate_dim`` if given."""
        ...


class ULLMEEmbedder:
    """An :class:`~ullme.models.ULLME`."""

    kind, similarity, default_max_length = "ullme", "cosine", DEFAULT_MAX_LENGTH

    def __init__(self, model: Any) -> None:
        self.model = model
        self.dimensions: int = model.hidden_size
        self.prompts: dict[str, Any] = model.prompts.to_dict()

    def revision(self) -> str:
        return revision(self.model, {})

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        max_length: int,
        batch_size: int | None = None,
        truncate_dim: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> np.ndarray:
        found = encoding.encode(
            self.model,
            texts,
            role,
            instruction,
            batch_size,
            max_length,
            show_progress_bar=False,
            convert_to_tensor=False,
            truncate_dim=truncate_dim,
            on_batch=on_batch,
        )
        return cast(np.ndarray, found)


class SentenceTransformerEmbedder:
    """A model of sentence-transformers, with its own prompts and similarity.

    Raises:
        ValueError: its similarity is neither the cosine nor the dot product.
    """

    kind = "sentence-transformers"

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.similarity: str = str(model.similarity_fn_name or "cosine")
        if self.similarity not in ("cosine", "dot"):
            raise ValueError(f"{name!r} compares by {self.similarity}; search knows the cosine and the dot product")
        self.dimensions: int = model.get_embedding_dimension()
        self.prompts: dict[str, Any] = dict(model.prompts)
        self.default_max_length: int = model.max_seq_length or DEFAULT_MAX_LENGTH

    def revision(self) -> str:
        return revision(self.model, {})

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        max_length: int,
        batch_size: int | None = None,
        truncate_dim: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> np.ndarray:
        if instruction is not None:
            raise ValueError("--instruction: a sentence-transformers model has its own prompts; leave it out")
        set_max_length(self.model, max_length)
        encode = self.model.encode_query if role == "query" else self.model.encode_document
        found = encode(
            list(texts),
            batch_size=batch_size or 32,
            show_progress_bar=False,
            truncate_dim=truncate_dim,
            normalize_embeddings=self.similarity == "cosine",
        )
        if on_batch is not None:
            on_batch(len(texts))
        return np.asarray(found, dtype=np.float32)


def load_text_embedder(name: str, *, device: str | None = None, **options: Any) -> TextEmbedder:
    """Load the model of a name.

    Args:
        name: run folder, .ckpt file, PEFT adapter (folder or hub), sentence-transformers model or LLM.
        device: None takes a GPU if there is one.
        **options: fields of :class:`~ullme.models.config.BackboneConfig` and ``prompts``, as for
            :func:`~ullme.models.checkpoint.load_embedder`; of a sentence-transformers model only ``dtype``.

    Raises:
        ValueError: nothing of this name, or options that this kind of model does not have.
    """
    from ullme.models.checkpoint import load_embedder, usable_device
    from ullme.models.loading import adapter_folder, is_sentence_transformer

    device = usable_device(device)
    if is_sentence_transformer(name):
        return _sentence_transformer(name, device, options)
    checkpoint = name if is_checkpoint(name) else adapter_folder(name)
    model = load_embedder(name if checkpoint is None else None, checkpoint, options)
    return ULLMEEmbedder(model.to(device).eval())


def check_instruction(prompts: Mapping[str, Any], role: Role, instruction: str | None) -> None:
    """Raises: ValueError: an instruction for a template that has no place for it."""
    template = prompts.get(role)
    if instruction is not None and isinstance(template, str) and "{instruction}" not in template:
        raise ValueError(
            f"--instruction {instruction!r}: the {role} template {template!r} has no {{instruction}}; leave it out"
        )


def is_checkpoint(name: str) -> bool:
    """Whether a name is a run folder or a checkpoint file: a file, or a folder that is neither LLM nor adapter."""
    path = Path(name)
    config_files = ("config.json", "adapter_config.json")
    return path.is_file() or (path.is_dir() and not any((path / file).is_file() for file in config_files))


def _sentence_transformer(name: str, device: str, options: dict[str, Any]) -> SentenceTransformerEmbedder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"{name!r} is a sentence-transformers model; pip install sentence-transformers to load it"
        ) from None
    dtype = options.pop("dtype", None)
    if options:
        raise ValueError(
            f"{name!r} is a sentence-transformers model with its own settings; leave out {sorted(options)}"
        )
    model = SentenceTransformer(name, device=device, model_kwargs={} if dtype is None else {"dtype": dtype})
    return SentenceTransformerEmbedder(model, name)
