"""Load the LLM: configuration, tokenizer, weights (quantised if asked for) and adapter."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ullme.models.attention.layers import token_table
from ullme.models.config import BackboneConfig
from ullme.utils.dotted_names import named
from ullme.utils.precision import loading_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def has_file(name: str, file: str) -> bool:
    """Whether a folder or hub repository has the file; looks into the cache first, and on the hub unless offline."""
    from huggingface_hub import constants, file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (folder := Path(name)).is_dir():
        return (folder / file).is_file()
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return True
        return not constants.is_offline_mode() and file_exists(name, file)
    except (HFValidationError, OSError):
        # No valid hub name, or the hub cannot be reached: loading the LLM will report it.
        return False


def is_adapter(name: str) -> bool:
    """Whether a name is a PEFT adapter. An LLM with an adapter in the same folder is none; loading it is refused."""
    return has_file(name, "adapter_config.json") and not has_file(name, "config.json")


def is_run(name: str) -> bool:
    """Whether a name is the folder of a training run, its folder of checkpoints, or one of these."""
    path = Path(name)
    if path.is_dir():
        return (path / "checkpoints").is_dir() or any(path.glob("*.ckpt"))
    return path.suffix == ".ckpt" and path.is_file()


def is_sentence_transformer(name: str) -> bool:
    """Whether a name is a sentence-transformers model: a folder or hub model with a modules.json."""
    return has_file(name, "modules.json")


def adapter_folder(name: str) -> Path | None:
    """The folder of the PEFT adapter with this name, downloaded if necessary; None if the name is no adapter.

    An LLM with an adapter in the same folder is none; loading it is refused.
    """
    if not is_adapter(name):
        return None
    if (folder := Path(name)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def load_config(options: BackboneConfig) -> PretrainedConfig:
    """Read config.json and check it, before any weight is read.

    Raises:
        ValueError: nothing to load under this name, an adapter beside the LLM, another model type than asked for, no
            decoder-only LLM, or quantization that is not possible here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    check_quantization(options)
    if options.family_code is not None:
        named(options.family_code, "family_code")
    name = options.model_name_or_path
    try:
        with _loading_errors(name, "config.json"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except ValueError as error:
        what = "an adapter" if is_adapter(name) else "a training run's" if is_run(name) else None
        if what is None:
            raise
        local = "" if Path(name).exists() else " (a folder)"
        raise ValueError(
            f"model_name_or_path={name!r} is {what}, not an LLM: to train from it, name its LLM there and set "
            f"init_from={name!r}{local}; to embed with it, load_ullme({name!r}) or evaluate --checkpoint {name}"
        ) from error
    if (Path(name) / "adapter_config.json").is_file():  # of the hub, load_backbone sees it
        raise _adapter_beside(name)
    expected_type = options.model_backbone_type
    if expected_type is not None and expected_type.lower() != config.model_type:
        raise ValueError(
            f"model_backbone_type={expected_type!r}, but {name!r} is of type {config.model_type!r}; "
            f"set model_backbone_type={config.model_type!r} or leave it out"
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


def _adapter_beside(name: str) -> ValueError:
    """The error for an LLM with an adapter beside it: transformers loads that too, unasked, and a new one switches it
    off, so that evaluation would embed with it, and training without."""
    local = "" if Path(name).is_dir() else "download both, "
    return ValueError(
        f"model_name_or_path={name!r} has an adapter (adapter_config.json) beside an LLM's config.json, and does not "
        f"say which of them is meant; {local}put the adapter's files into a folder of their own, and give the LLM as "
        "model_name_or_path, the adapter as init_from to train from it or as checkpoint to embed with it"
    )


def max_positions(config: PretrainedConfig) -> int:
    """The longest text, in tokens, for which an LLM has positions; 2^31 if there is no limit."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # the latter is MPT's
    return next((limit for name in names if (limit := getattr(config, name, None))), 2**31)


def choose_dtype(options: BackboneConfig, config: PretrainedConfig) -> BackboneConfig:
    """The options with ``dtype: auto`` replaced by float32, where there is no GPU and the CPU would compute slowly with
    the half-precision weights that are stored."""
    import torch

    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    dtype = loading_dtype(options.dtype, stored, "cuda" if torch.cuda.is_available() else "cpu")
    if dtype != options.dtype:
        logger.info("dtype=auto: %s weights are loaded in %s, which this CPU multiplies faster", stored, dtype)
    return replace(options, dtype=dtype)


def load_tokenizer(options: BackboneConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a pad token.

    If the tokenizer has none, its end, unknown or begin token (else token 0) is used: padding never enters the
    computation, so any token will do, and the vocabulary keeps its size.
    """
    from transformers import AutoTokenizer

    name = options.model_name_or_path
    with _loading_errors(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    if tokenizer.pad_token_id is None:
        size = len(tokenizer)
        tokens = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((t for t in tokens if t is not None), tokenizer.convert_ids_to_tokens(0))
        assert len(tokenizer) == size
        logger.warning(
            "%s has no pad token; %r is used for padding, which is never computed on", name, tokenizer.pad_token
        )
    # No warning about long texts: they are truncated to max_length afterwards, keeping the end of the template.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_backbone(options: BackboneConfig, config: PretrainedConfig) -> PreTrainedModel:
    """Load the causal LM, without an adapter.

    Raises:
        ValueError: missing or unreadable weights, or an adapter beside them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    extra = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    with _loading_errors(options.model_name_or_path, "weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            options.model_name_or_path,
            config=config,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **extra,
            **quantization_options(options),
        )
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapter_beside(options.model_name_or_path)
    model.weights_not_stored = frozenset(report["missing_keys"])  # they are random
    return model


def check_quantization(options: BackboneConfig) -> None:
    """Check that the LLM can be quantised here, before any weight is read.

    Raises:
        ValueError: there is no GPU, no bitsandbytes, or no adapter to train.
    """
    if options.quantization == "none":
        return
    import torch

    def error(reason: str) -> ValueError:
        return ValueError(f"quantization={options.quantization!r}: {reason}, or set quantization=none")

    if options.lora_name is None:
        raise error("quantised weights cannot be trained themselves; set lora_name to train an adapter")
    if not torch.cuda.is_available():
        raise error("bitsandbytes needs a CUDA device, and there is none here; run it on a GPU")
    if find_spec("bitsandbytes") is None:
        raise error("bitsandbytes is not installed; pip install 'ullme[quantization]'")


def quantization_options(options: BackboneConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load the LLM quantised, onto the current GPU, through bitsandbytes.

    ``nf4`` is QLoRA's 4-bit NormalFloat with double quantisation and products in bfloat16 (arXiv 2305.14314);
    ``int8`` is LLM.int8(), which keeps outlier features in half precision (arXiv 2208.07339). Norms, embeddings and
    the LM head keep their dtype: PEFT's ``prepare_model_for_kbit_training``, which casts them to float32 (large, for a
    vocabulary of 128k tokens) and turns on reentrant checkpointing, is not needed to train an adapter.
    """
    if options.quantization == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if options.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raises: ValueError: the tokenizer has ids for which the LLM has no embedding."""
    rows = len(token_table(model))
    missing = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not missing:
        return
    if missing.keys() <= tokenizer.get_added_vocab().keys():
        added = sorted(missing, key=missing.__getitem__)
        more = f" and {len(added) - 4} more" if len(added) > 4 else ""
        raise ValueError(
            f"model_name_or_path={name!r}: the LLM embeds {rows} tokens, and the tokenizer has others that were added "
            f"to it: {', '.join(map(repr, added[:4]))}{more}; take them out of tokenizer.json and "
            "tokenizer_config.json (padding needs no token of its own here), or give the LLM rows for them with "
            f"resize_token_embeddings({max(missing.values()) + 1}) and save it"
        )
    raise ValueError(
        f"model_name_or_path={name!r}: the tokenizer has {len(tokenizer)} tokens and the LLM embeds {rows}; "
        "they belong to different models; give a folder or hub name where they match"
    )


class Identity(NamedTuple):
    """What tells pre-trained LLMs apart, without reading all their weights.

    Args:
        fingerprint: a hash of weights and configuration.
        weights: a hash of the name, shape, dtype and up to 32 values of every weight.
        config: the fields of the configuration as plain values. Versions of transformers differ in which fields an LLM
            has (Phi's lost one between 5.2 and 5.23).
    """

    fingerprint: str
    weights: str
    config: dict[str, Any]


def identity(model: PreTrainedModel) -> Identity:
    """The identity of an LLM in memory."""
    config = model.config.to_dict()
    for ignored in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(ignored, None)
    text = json.dumps(config, sort_keys=True, default=lambda value: sorted(value) if _is_set(value) else str(value))
    both, weights = hashlib.sha256(text.encode()), hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 32)][:32].double().cpu()
        described = f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample.tolist()}".encode()
        both.update(described)
        weights.update(described)
    return Identity(both.hexdigest()[:32], weights.hexdigest()[:32], json.loads(text))


def _is_set(value: Any) -> bool:
    """Of names, whose order differs between processes."""
    return isinstance(value, set | frozenset) and all(isinstance(one, str) for one in value)


def add_adapter(model: PreTrainedModel, options: BackboneConfig) -> nn.Module:
    """Add LoRA (arXiv 2106.09685) through PEFT, or mark the LLM's own weights that are trained.

    Raises:
        ValueError: lora_target_modules match nothing, or train=biases for an LLM without biases.
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
    from transformers.pytorch_utils import Conv1D

    from ullme.models import lora as lora_layers

    targets: str | list[str] = options.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]
    lora = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats too
        lora_dropout=0.0,  # set afterwards, for the layers that can have it
        target_modules=targets,
        exclude_modules=(lora_layers.modules_to_exclude(model) or None) if targets == "all-linear" else None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores (in, out)
    )
    try:
        with lora_layers.without_deprecation_warning():
            wrapped = get_peft_model(model, lora, adapter_name=options.lora_name)
    except ValueError as error:
        raise ValueError(f"lora_target_modules={options.lora_target_modules!r}: {error}") from error
    lora_layers.set_dropout(wrapped, options.lora_name, options.lora_dropout)
    lora_layers.install(wrapped)
    return wrapped


@contextmanager
def _loading_errors(name: str, part: str) -> Iterator[None]:
    """Turn any error of transformers' loaders into a ValueError with option, value and remedy."""
    try:
        yield
    except Exception as error:  # damaged or foreign folders make the loaders raise errors of many types
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model_name_or_path={name!r} needs its own code to load the {part}, which is not run; take a model "
                "that transformers supports, or set model.backbone.trust_remote_code=true if you trust the code"
            ) from error
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"model_name_or_path={name!r}: cannot load the {part} ({type(error).__name__}: {reason}); "
            "give a folder written by save_pretrained, or a hub name that this machine can reach"
        ) from error
