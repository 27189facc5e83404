"""ULLME as an mteb encoder, with the prompt template and instruction for each side of every task type.

Importing this module imports mteb.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from ullme.models.checkpoint import load_embedder, usable_device
from ullme.models.compression import check_truncate_dim
from ullme.models.loading import adapter_folder, is_sentence_transformer
from ullme.models.revision import revision
from ullme.models.sentence_transformer_length import set_max_length

if TYPE_CHECKING:
    import numpy as np
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import Array, BatchedInput
    from torch.utils.data import DataLoader

    from ullme.models.ullme import ULLME

DEFAULT_MAX_LENGTH = 512
# Instructions of E5-mistral (arXiv 2401.00368, appendix) that mteb lacks, by the beginning of the task's name.
RETRIEVAL_INSTRUCTIONS = {
    "CQADupstack": "Given a question, retrieve detailed question descriptions from Stackexchange that are duplicates "
    "to the given question",
}


class WrappedULLME(AbsEncoder):
    """A trained ULLME, a plain LLM or a sentence-transformers model as an mteb 2.x encoder.

    Queries get the query template with the task's instruction, documents the passage template. Symmetric tasks (STS,
    classification, clustering, pair classification, summarisation, bitext mining ...) use the query template for every
    text, as E5-mistral does (arXiv 2401.00368, section 4). The instruction is the first that is found in:
    ``instructions``; the task (mteb has those of E5-mistral, except CQADupstack's, which are here); for retrieval and
    reranking, the prompt contract; for other tasks, mteb's instruction for the task type.

    A sentence-transformers folder or hub model (one with a modules.json) is run by mteb's own wrapper, so its scores
    are those that mteb reports.

    Args:
        model_name_or_path: hub name or folder of an LLM, of a PEFT adapter, whose config names its LLM, or of a
            sentence-transformers model. None takes the LLM that the checkpoint was trained from.
        model_backbone_type: transformers' model_type; checked if given.
        lora_name: name of the adapter; None takes the checkpoint's.
        lora_r: rank of LoRA; None takes the checkpoint's.
        lora_alpha: numerator of LoRA's scale; None takes the checkpoint's.
        model_checkpoint: a run folder, a Lightning checkpoint or an adapter folder; None evaluates the LLM itself.
        max_length: in tokens, template included; None is 512, or a sentence-transformers model's own.
        use_task_instructions: False uses the prompt contract's instruction for all tasks.
        instructions: instruction by task name, or by task type ("STS", "Classification" ...).
        device: where to run; None takes a GPU if there is one.
        truncate_dim: keep so many of the first dimensions, of unit length again; None keeps all.
        **options: further options of :class:`~ullme.models.ULLME` (pooling, attention, dtype ...). ``prompts`` may
            also be a mapping with fields of the prompt contract to replace.

    Raises:
        ValueError: neither model nor checkpoint, options that this kind of model does not have, or a checkpoint that
            does not fit the LLM.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model_name_or_path: str | Path | None = None,
        model_backbone_type: str | None = None,
        lora_name: str | None = None,
        lora_r: int | None = None,
        lora_alpha: float | None = None,
        model_checkpoint: str | Path | None = None,
        *,
        max_length: int | None = None,
        use_task_instructions: bool = True,
        instructions: Mapping[str, str] | None = None,
        device: str | None = None,
        truncate_dim: int | None = None,
        **options: Any,
    ) -> None:
        if model_name_or_path is None and model_checkpoint is None:
            raise ValueError("model_name_or_path and model_checkpoint are both missing; give at least one of them")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        name = None if model_name_or_path is None else str(model_name_or_path)
        device = usable_device(device)
        adapter = {"lora_name": lora_name, "lora_r": lora_r, "lora_alpha": lora_alpha}
        settings = {**adapter, "model_backbone_type": model_backbone_type, **options}
        settings = {option: value for option, value in settings.items() if value is not None}
        self.use_task_instructions = use_task_instructions
        self.prompts_dict = dict(instructions or {})
        self.delegate: AbsEncoder | None = None
        if name is not None and model_checkpoint is None and is_sentence_transformer(name):
            self.delegate = _sentence_transformer(name, device, max_length, settings)
            self.model: Any = self.delegate.model
            self.max_length = self.model.max_seq_length
        else:
            folder = adapter_folder(name) if name is not None and model_checkpoint is None else None
            source = (name, model_checkpoint) if folder is None else (None, folder)
            self.model = load_embedder(*source, settings).to(device).eval()
            self.max_length = DEFAULT_MAX_LENGTH if max_length is None else max_length
        self.truncate_dim = self._checked_dim(truncate_dim)
        self.mteb_model_meta = self._model_meta(name, model_checkpoint)

    def _checked_dim(self, truncate_dim: int | None) -> int | None:
        """The number of dimensions to keep, which a sentence-transformers model keeps by itself.

        Raises:
            ValueError: the model has not so many.
        """
        if truncate_dim is None:
            return None
        check_truncate_dim(truncate_dim, _embedding_size(self.model) or truncate_dim)
        if self.delegate is not None:
            self.model.truncate_dim = truncate_dim
        return truncate_dim

    @classmethod
    def from_model(cls, model: ULLME, name: str, **settings: Any) -> WrappedULLME:
        """Wrap a model that is already loaded, for example during training.

        Args:
            model: the model, on any device.
            name: the model name under which mteb stores results; a hash of the weights is added as revision.
            **settings: max_length, truncate_dim, use_task_instructions and instructions, as in the constructor.

        Raises:
            ValueError: any other setting.
        """
        wrapped = cls.__new__(cls)
        wrapped.model, wrapped.delegate = model, None
        wrapped.max_length = settings.pop("max_length", DEFAULT_MAX_LENGTH)
        wrapped.truncate_dim = wrapped._checked_dim(settings.pop("truncate_dim", None))
        wrapped.use_task_instructions = settings.pop("use_task_instructions", True)
        wrapped.prompts_dict = dict(settings.pop("instructions", None) or {})
        if settings:
            raise ValueError(
                f"{sorted(settings)}: from_model does not know the settings; give only max_length, "
                "truncate_dim, use_task_instructions or instructions"
            )
        wrapped.mteb_model_meta = wrapped._model_meta(name, None)
        return wrapped

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray | Array:
        """Embed the R texts of mteb's loader: (R, D) normalised embeddings in float32."""
        if self.delegate is not None:
            return self.delegate.encode(
                inputs,
                task_metadata=task_metadata,
                hf_split=hf_split,
                hf_subset=hf_subset,
                prompt_type=prompt_type,
                **kwargs,
            )
        return self.model.encode(
            [text for batch in inputs for text in batch["text"]],
            role="passage" if prompt_type == PromptType.document else "query",
            instruction=self.instruction_for(task_metadata),
            batch_size=kwargs.get("batch_size"),
            max_length=self.max_length,
            truncate_dim=self.truncate_dim,
            show_progress_bar=kwargs.get("show_progress_bar", False),
        )

    def instruction_for(self, task_metadata: TaskMetadata) -> str | None:
        """The instruction for a task; None means the prompt contract's."""
        if not self.use_task_instructions:
            return None
        configured = {task_metadata.name, task_metadata.type} & set(self.prompts_dict or {})
        asymmetric = task_metadata.simplified_task_type == "retrieval"
        if asymmetric and not configured and not _query_prompt(task_metadata):
            known = RETRIEVAL_INSTRUCTIONS.items()
            return next((text for start, text in known if task_metadata.name.startswith(start)), None)
        return self.get_instruction(task_metadata, PromptType.query) or None

    def similarity(self, embeddings1: Array, embeddings2: Array) -> Array:
        """Cosine similarities, or a sentence-transformers model's own."""
        if self.delegate is not None:
            return self.delegate.similarity(embeddings1, embeddings2)
        return super().similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> Array:
        """As :meth:`similarity`, row by row."""
        if self.delegate is not None:
            return self.delegate.similarity_pairwise(embeddings1, embeddings2)
        return super().similarity_pairwise(embeddings1, embeddings2)

    def _model_meta(self, name: str | None, checkpoint: str | Path | None) -> ModelMeta:
        """The metadata for mteb. Its name and revision identify stored results."""
        settings = self._settings()
        model_name = name if name is not None else self.model.options.model_name_or_path
        similarity = None if self.delegate is not None else ScoringFunction.COSINE
        return ModelMeta.create_empty(
            overwrites={
                "name": result_name(model_name, checkpoint),
                "revision": revision(self.model, settings),
                "loader_kwargs": settings,
                "n_parameters": sum(p.numel() for p in self.model.parameters()),
                "embed_dim": self.truncate_dim or _embedding_size(self.model),
                "max_tokens": self.max_length,
                "framework": ["PyTorch"] if self.delegate is None else ["Sentence Transformers", "PyTorch"],
                "similarity_fn_name": similarity,
                "use_instructions": self.delegate is None and "{instruction}" in self.model.prompts.query,
            }
        )

    def _settings(self) -> dict[str, Any]:
        """How the model is used, for mteb's records; what it is besides is in its revision."""
        settings: dict[str, Any] = {"max_length": self.max_length, "dtype": str(next(self.model.parameters()).dtype)}
        if self.truncate_dim is not None:
            settings["truncate_dim"] = self.truncate_dim
        if self.delegate is not None:
            return {**settings, "prompts": self.model.prompts}
        return {
            **settings,
            "pooling": self.model.options.pooling,
            "attention": self.model.options.attention,
            "prompts": self.model.prompts.to_dict(),
            "use_task_instructions": self.use_task_instructions,
            "instructions": self.prompts_dict,
        }


def _sentence_transformer(name: str, device: str, max_length: int | None, options: dict[str, Any]) -> AbsEncoder:
    """mteb's wrapper of a sentence-transformers model. Raises: ValueError: it cannot be loaded, or other options."""
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    dtype = options.pop("dtype", None)
    if unsupported := sorted(set(options) - {"lora_name", "lora_r", "lora_alpha", "model_backbone_type"}):
        raise ValueError(
            f"{name!r} is a sentence-transformers model and brings its own settings; leave out {unsupported}"
        )
    loading: dict[str, Any] = {} if dtype is None else {"model_kwargs": {"dtype": dtype}}
    try:
        wrapper = SentenceTransformerEncoderWrapper(name, device=device, **loading)
    except Exception as error:
        raise ValueError(
            f"model_name_or_path={name!r} has a modules.json, but sentence-transformers cannot load it ({error}); "
            "give a folder written by its save()"
        ) from error
    if max_length is not None:
        set_max_length(wrapper.model, max_length)
    return wrapper


def _query_prompt(task_metadata: TaskMetadata) -> str | None:
    """The query instruction that mteb has for the task, if any."""
    prompt: Any = task_metadata.prompt
    return prompt.get("query") if isinstance(prompt, dict) else prompt


def _embedding_size(model: Any) -> int | None:
    """The embedding dimension of a ULLME or a sentence-transformers model."""
    return model.get_embedding_dimension() if hasattr(model, "get_embedding_dimension") else model.hidden_size


def result_name(model_name: str, checkpoint: str | Path | None) -> str:
    """The model name for mteb, ``organisation/model``, followed by the checkpoint: ``local/llama--my-run``.

    A Lightning checkpoint ``my-run/checkpoints/last.ckpt`` gives ``local/llama--my-run-last``.
    """
    local = os.path.isdir(model_name) or model_name.count("/") != 1
    name = f"local/{Path(model_name).resolve().name}" if local else model_name
    if checkpoint is not None:
        path = Path(checkpoint).resolve()
        parts = [path.name] if path.is_dir() else [_run_folder(path).name, path.stem]
        name = f"{name}--{'-'.join(parts)}"
    return re.sub(r"[^\w./-]+", "_", name)


def _run_folder(file: Path) -> Path:
    """The run folder of a checkpoint file."""
    return next((folder for folder in file.parents if folder.name != "checkpoints"), file.parent)
