"""ULLME as an mteb encoder: the right template and instruction on each side of every task type.

This module imports mteb; ``from ullme.models import WrappedULLME`` is what loads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from ullme.models.checkpoint import load_embedder, usable_device
from ullme.models.identity import adapter_folder, is_sentence_transformer, result_name, weights_digest

if TYPE_CHECKING:
    import numpy as np
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import Array, BatchedInput
    from torch.utils.data import DataLoader

    from ullme.models.ullme import ULLME

DEFAULT_MAX_LENGTH = 512
# E5-mistral's (arXiv 2401.00368, appendix), by the beginning of a task's name, where mteb carries none.
RETRIEVAL_INSTRUCTIONS = {
    "CQADupstack": "Given a question, retrieve detailed question descriptions from Stackexchange that are duplicates "
    "to the given question",
}


class WrappedULLME(AbsEncoder):
    """A trained ULLME, a plain LLM or a sentence-transformers model as an mteb 2.x encoder.

    Queries get the query template with the task's own instruction, documents the passage template. Tasks without
    sides (STS, classification, clustering, pair classification, summarisation, bitext mining ...) use the query
    template for every text, as E5-mistral does (arXiv 2401.00368, section 4). An instruction is taken from, in this
    order: ``instructions``; the task (mteb carries those of E5-mistral, all but CQADupstack's, which are here); for
    retrieval and reranking the prompt contract; for the others mteb's general one for the task type.

    A sentence-transformers folder or hub model (it has a modules.json) is handed to mteb's own wrapper, so that its
    scores are mteb's own.

    Args:
        model_name_or_path: hub name or folder of an LLM, of a LoRA adapter (PEFT), which brings its LLM's name, or of
            a sentence-transformers model. None takes the LLM that the checkpoint was trained from.
        model_backbone_type: transformers' model_type; checked if given.
        lora_name: name of the adapter. None, as for the next two, takes the checkpoint's.
        lora_r: rank of LoRA.
        lora_alpha: scale of LoRA.
        model_checkpoint: a run folder, a Lightning checkpoint or an adapter folder. None takes the LLM untrained.
        max_length: in tokens, template included; 512 unless given, for a sentence-transformers model its own.
        use_task_instructions: False puts the contract's own instruction everywhere.
        instructions: instruction by task name, or by task type ("STS", "Classification" ...).
        device: where to run; a GPU if there is one, unless given.
        **options: further options of :class:`~ullme.models.ULLME` (pooling, attention, dtype ...). ``prompts`` may
            also be a mapping with the fields of the prompt contract to replace.

    Raises:
        ValueError: neither model nor checkpoint, options that do not fit the kind of model, or a checkpoint that does
            not fit the LLM.
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
        **options: Any,
    ) -> None:
        if model_name_or_path is None and model_checkpoint is None:
            raise ValueError("model_name_or_path and model_checkpoint are both missing; give at least one of them")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        name = None if model_name_or_path is None else str(model_name_or_path)
        device = usable_device(device)
        adapter = {"lora_name": lora_name, "lora_r": lora_r, "lora_alpha": lora_alpha}
        given = {**adapter, "model_backbone_type": model_backbone_type, **options}
        given = {option: value for option, value in given.items() if value is not None}
        self.use_task_instructions = use_task_instructions
        self.prompts_dict = dict(instructions or {})
        self.delegate: AbsEncoder | None = None
        if name is not None and model_checkpoint is None and is_sentence_transformer(name):
            self.delegate = _sentence_transformer(name, device, max_length, given)
            self.model: Any = self.delegate.model
            self.max_length = self.model.max_seq_length
        else:
            adapter_at = adapter_folder(name) if name is not None and model_checkpoint is None else None
            source = (name, model_checkpoint) if adapter_at is None else (None, adapter_at)
            self.model = load_embedder(*source, given).to(device).eval()
            self.max_length = DEFAULT_MAX_LENGTH if max_length is None else max_length
        self.mteb_model_meta = self._model_meta(name, model_checkpoint)

    @classmethod
    def from_model(cls, model: ULLME, name: str, **settings: Any) -> WrappedULLME:
        """Wrap a model that is already in memory, during training for example.

        Args:
            model: the model; it is used as it is, on its device.
            name: what its results are filed under, together with a hash of the weights.
            **settings: max_length, use_task_instructions and instructions, as in the constructor.
        """
        wrapped = cls.__new__(cls)
        wrapped.model, wrapped.delegate = model, None
        wrapped.max_length = settings.pop("max_length", DEFAULT_MAX_LENGTH)
        wrapped.use_task_instructions = settings.pop("use_task_instructions", True)
        wrapped.prompts_dict = dict(settings.pop("instructions", None) or {})
        if settings:
            raise ValueError(f"from_model does not know the settings {sorted(settings)}")
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
        """mteb's entry: (R, D) float32 embeddings of the R texts, normalised."""
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
            show_progress_bar=kwargs.get("show_progress_bar", False),
        )

    def instruction_for(self, task_metadata: TaskMetadata) -> str | None:
        """The task's instruction; None stands for the prompt contract's own."""
        if not self.use_task_instructions:
            return None
        chosen = {task_metadata.name, task_metadata.type} & set(self.prompts_dict or {})
        has_sides = task_metadata.simplified_task_type == "retrieval"
        if has_sides and not chosen and not _query_prompt(task_metadata):
            known = RETRIEVAL_INSTRUCTIONS.items()
            return next((text for start, text in known if task_metadata.name.startswith(start)), None)
        return self.get_instruction(task_metadata, PromptType.query) or None

    def similarity(self, embeddings1: Array, embeddings2: Array) -> Array:
        """Cosine, or what the sentence-transformers model was made for."""
        if self.delegate is not None:
            return self.delegate.similarity(embeddings1, embeddings2)
        return super().similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> Array:
        """As :meth:`similarity`, row by row."""
        if self.delegate is not None:
            return self.delegate.similarity_pairwise(embeddings1, embeddings2)
        return super().similarity_pairwise(embeddings1, embeddings2)

    def _model_meta(self, name: str | None, checkpoint: str | Path | None) -> ModelMeta:
        """Name and content-based revision: what mteb files the results under."""
        settings = self._settings()
        identity = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        identity.update(weights_digest(self.model))
        model_name = name if name is not None else self.model.options.model_name_or_path
        similarity = None if self.delegate is not None else ScoringFunction.COSINE
        return ModelMeta.create_empty(
            overwrites={
                "name": result_name(model_name, checkpoint),
                "revision": identity.hexdigest()[:12],
                "loader_kwargs": settings,
                "n_parameters": sum(p.numel() for p in self.model.parameters()),
                "embed_dim": _embedding_size(self.model),
                "max_tokens": self.max_length,
                "framework": ["PyTorch"] if self.delegate is None else ["Sentence Transformers", "PyTorch"],
                "similarity_fn_name": similarity,
                "use_instructions": self.delegate is None and "{instruction}" in self.model.prompts.query,
            }
        )

    def _settings(self) -> dict[str, Any]:
        """Everything but the weights that an embedding depends on."""
        settings: dict[str, Any] = {"max_length": self.max_length, "dtype": str(next(self.model.parameters()).dtype)}
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
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    dtype = options.pop("dtype", None)
    if unfit := sorted(set(options) - {"lora_name", "lora_r", "lora_alpha", "model_backbone_type"}):
        raise ValueError(f"{name!r} is a sentence-transformers model and brings its own settings; leave out {unfit}")
    loading: dict[str, Any] = {} if dtype is None else {"model_kwargs": {"dtype": dtype}}
    try:
        wrapper = SentenceTransformerEncoderWrapper(name, device=device, **loading)
    except Exception as error:
        raise ValueError(
            f"model_name_or_path={name!r} has a modules.json, but sentence-transformers cannot load it: {error}"
        ) from error
    if max_length is not None:
        wrapper.model.max_seq_length = max_length
    return wrapper


def _query_prompt(task_metadata: TaskMetadata) -> str | None:
    prompt: Any = task_metadata.prompt
    return prompt.get("query") if isinstance(prompt, dict) else prompt


def _embedding_size(model: Any) -> int | None:
    return model.get_embedding_dimension() if hasattr(model, "get_embedding_dimension") else model.hidden_size
