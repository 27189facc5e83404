"""Training in several stages: start from the trained weights of an earlier run (``init_from``, ``init_mode``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ullme.models.trained_weights import copy_weights, read_checkpoint, rebuild_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullme.models.config import BackboneConfig
    from ullme.models.interface import Embedder


def merged_backbone(model_class: type[Any], options: BackboneConfig) -> tuple[PreTrainedModel, nn.Module | None]:
    """The LLM with an earlier run's trained weights merged into it, and that run's pooler, if it has one.

    The earlier run may itself have started from another one.

    Args:
        model_class: :class:`~ullme.models.ULLME`, or a class with the same constructor.
        options: of the new run; ``init_from`` names the earlier one.

    Raises:
        ValueError: no such run, a run on another LLM, or a quantised LLM.
    """
    assert options.init_from is not None
    if options.quantization != "none":
        raise ValueError(
            f"init_from={options.init_from!r}: an adapter cannot be merged into quantised weights; set "
            "quantization=none, or init_mode=continue"
        )
    overrides = {
        "model_name_or_path": options.model_name_or_path,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
        "trust_remote_code": options.trust_remote_code,
        "family_code": options.family_code,
        **({"pooling": options.pooling} if "." in options.pooling else {}),
        # the earlier model is only merged, never run
        **{"attention_path": "padded", "probe": False, "compile": False, "gradient_checkpointing": False},
        "quantization": "none",
    }
    try:
        earlier = rebuild_model(model_class, options.init_from, strict=True, **overrides)
    except ValueError as error:
        raise _with_options(options, error) from error
    from ullme.models import lora  # imports PEFT

    has_adapter = earlier.options.lora_name is not None
    return (lora.merge(earlier.llm) if has_adapter else earlier.causal_lm), earlier.pooler


def continue_training(model: Embedder) -> None:
    """Copy an earlier run's trained weights into a model with the same trained weights, to continue training them.

    Raises:
        ValueError: no such run, another LLM, or other trained weights than this model's.
    """
    source = model.options.init_from
    assert source is not None
    try:
        copy_weights(model, *read_checkpoint(source), source, strict=True)
    except ValueError as error:
        raise _with_options(model.options, error) from error


def _with_options(options: BackboneConfig, error: ValueError) -> ValueError:
    return ValueError(f"init_from={options.init_from!r}, init_mode={options.init_mode}: {error}")
