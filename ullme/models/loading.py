"""Loading the LLM: configuration, tokenizer, weights and adapter, with the errors that need no forward pass."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ullme.models.attention.layers import token_table
from ullme.models.config import BackboneConfig
from ullme.models.quantization import check_quantization, loading_options
from ullme.utils.dotted_names import named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_config(options: BackboneConfig) -> PretrainedConfig:
    """Read config.json and refuse what is no decoder-only LLM or cannot be quantised, before any weight is read.

    Raises:
        ValueError: nothing to load under this name, another model type than asked for, or not a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    check_quantization(options)
    if options.family_code is not None:
        named(options.family_code, "family_code")
    name = options.model_name_or_path
    with _explained(name, "config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    wanted = options.model_backbone_type
    if wanted is not None and wanted.lower() != config.model_type:
        raise ValueError(
            f"model_backbone_type={wanted!r}, but {name!r} is of type {config.model_type!r}; "
            f"write model_backbone_type={config.model_type!r} or leave it out"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model_name_or_path={name!r} ({config.model_type}) is an encoder-decoder; take a decoder LLM")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ValueError(f"model_name_or_path={name!r} ({config.model_type}) is an encoder; take a decoder-only LLM")
    if type(config) not in AutoModelForCausalLM._model_mapping and not options.trust_remote_code:
        raise ValueError(
            f"model_name_or_path={name!r}: transformers has no causal language model of type "
            f"{config.model_type!r}; take a decoder-only LLM"
        )
    return config


def load_tokenizer(options: BackboneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token.

    A missing pad token is borrowed from the vocabulary (end, unknown or begin token, else token 0): padding never
    reaches the LLM, so its identity is of no consequence, and the vocabulary keeps its size.
    """
    from transformers import AutoTokenizer

    name = options.model_name_or_path
    with _explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    if tokenizer.pad_token_id is None:
        size = len(tokenizer)
        tokens = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((t for t in tokens if t is not None), tokenizer.convert_ids_to_tokens(0))
        assert len(tokenizer) == size
        logger.warning("%s has no pad token: %r pads, and is never computed with", name, tokenizer.pad_token)
    # texts are cut at max_length afterwards, with the template's end kept; the warning would say that they are not
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_backbone(options: BackboneConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The causal LM, without an adapter.

    Raises:
        ValueError: missing or unreadable weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    extra = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    with _explained(options.model_name_or_path, "weights"):
        return AutoModelForCausalLM.from_pretrained(
            options.model_name_or_path,
            config=config,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            **extra,
            **loading_options(options),
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raises: ValueError: the tokenizer knows ids for which the LLM has no embedding."""
    rows = len(token_table(model))
    if len(tokenizer) > rows:
        raise ValueError(
            f"model_name_or_path={name!r}: the tokenizer has {len(tokenizer)} tokens and the LLM embeds {rows}; "
            "they belong to different models"
        )


def fingerprint(model: PreTrainedModel) -> str:
    """A hash over the config and the names, shapes, dtypes and a few values of all weights: cheap to make."""
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 32)][:32].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample.tolist()}".encode())
    return digest.hexdigest()[:32]


def add_adapter(model: PreTrainedModel, options: BackboneConfig) -> nn.Module:
    """Wrap the LLM with LoRA (arXiv 2106.09685) through PEFT, or choose which of its own weights are trained.

    Raises:
        ValueError: lora_target_modules match nothing, or an LLM without biases shall train them.
    """
    if options.trained == "all":
        return model.requires_grad_(True)
    if options.trained == "biases":
        model.requires_grad_(False)
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        if not biases:
            raise ValueError(
                f"train=biases, but {options.model_name_or_path!r} ({model.config.model_type}) has none; take an LLM "
                "with biases (gpt2, gpt_neo, gpt_neox, opt, phi ...), or train an adapter"
            )
        for bias in biases:
            bias.requires_grad_(True)
        return model
    assert options.lora_name is not None
    from peft import LoraConfig, get_peft_model

    from ullme.models import lora as lora_layers

    targets: str | list[str] = options.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]
    lora = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # PEFT divides whatever number it is
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        exclude_modules=(lora_layers.unfit(model) or None) if targets == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, lora, adapter_name=options.lora_name)
    except ValueError as error:
        raise ValueError(f"lora_target_modules={options.lora_target_modules!r}: {error}") from error
    lora_layers.install(wrapped)
    return wrapped


def set_attention_dropout(model: nn.Module, share: float) -> None:
    """Drop attention weights while training; the config, by which a pre-trained LLM is known, stays as it is.

    Raises:
        ValueError: the family keeps its attention dropout where this does not find it.
    """
    found = False
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                value.p, found = share, True
            elif isinstance(value, float | int):
                setattr(module, name, share)
                found = True
    if not found:
        raise ValueError(f"attention_dropout={share}: the {type(model).__name__} has none that is known; leave it out")


@contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    """Turn a loader's errors into one that names the option, the value and the remedy."""
    try:
        yield
    except Exception as error:  # whatever a damaged or foreign folder makes of the loaders
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model_name_or_path={name!r} brings its own code for its {part}, which is not run; take a model that "
                "transformers knows, or set model.backbone.trust_remote_code=true if you trust it"
            ) from error
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"model_name_or_path={name!r}: cannot load the {part} ({type(error).__name__}: {reason}); "
            "give a folder written by save_pretrained, or a hub name that this machine can reach"
        ) from error
