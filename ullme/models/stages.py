"""Runs in several stages: a model that starts from what an earlier run trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ullme.models.config import BackboneConfig
    from ullme.models.ullme import ULLME


def merged_backbone(options: BackboneConfig) -> tuple[PreTrainedModel, nn.Module | None]:
    """The LLM with what an earlier run trained merged into its weights, and that run's trained pooling, if any.

    The earlier run may itself have started from another.

    Raises:
        ValueError: no such run, a run on another LLM, or weights that cannot be merged into.
    """
    from ullme.models.checkpoint import load_ullme

    assert options.init_from is not None
    if options.quantization != "none":
        raise ValueError(
            f"init_from={options.init_from!r}: an adapter is not merged into quantised weights; set quantization=none, "
            "or init_mode=continue"
        )
    loading = {
        "model_name_or_path": options.model_name_or_path,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
        "trust_remote_code": options.trust_remote_code,
        "family_code": options.family_code,
        **({"pooling": options.pooling} if "." in options.pooling else {}),
        # it is not run, so it need not be fast, nor asked how it attends
        **{"attention_path": "padded", "probe": False, "compile": False, "gradient_checkpointing": False},
        "quantization": "none",
    }
    try:
        earlier = load_ullme(options.init_from, strict=True, **loading)
    except ValueError as error:
        raise _explained(options, error) from error
    adapted = earlier.options.lora_name is not None
    return (earlier.llm.merge_and_unload() if adapted else earlier.causal_lm), earlier.pooler  # type: ignore[operator]


def continue_training(model: ULLME) -> None:
    """Copy an earlier run's trained weights, which must be of the same kind, to go on training them.

    Raises:
        ValueError: no such run, another LLM, or other trained weights than this model's.
    """
    from ullme.models.trained_weights import fit_weights, read_checkpoint

    source = model.options.init_from
    assert source is not None
    try:
        fit_weights(model, *read_checkpoint(source), source, strict=True)
    except ValueError as error:
        raise _explained(model.options, error) from error


def _explained(options: BackboneConfig, error: ValueError) -> ValueError:
    return ValueError(f"init_from={options.init_from!r}, init_mode={options.init_mode}: {error}")
