"""Loading the LLM: configuration, tokenizer, weights, adapter; and every refusal that needs no forward pass."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ullme.models.layers import token_table
from ullme.models.pooling import POOLING_METHODS, own_pooling
from ullme.models.quantization import check_quantization, loading_options
from ullme.models.stages import INIT_MODES, InitMode
from ullme.named import named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Attention = Literal["bidirectional", "causal"]
AttentionPath = Literal["auto", "packed", "padded", "flags", "mask4d"]
Quantization = Literal["none", "nf4", "int8"]
POOLINGS = (*POOLING_METHODS, "latent_attention")
Trained = Literal["lora", "biases", "all"]
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class BackboneConfig:
    """How to build the embedder from an LLM. The defaults are the paper's (arXiv 2408.03402).

    Args:
        model_name_or_path: a hub name or a local folder of a decoder-only LLM.
        model_backbone_type: transformers' model_type (mistral, llama, phi ...); checked if given.
        lora_name: name of the adapter; null for none.
        train: lora, an adapter; biases alone (BitFit, arXiv 2106.10199); or all weights. null is lora where there is
            a lora_name, and all where it is null.
        lora_r: rank of LoRA.
        lora_alpha: scale of LoRA, over the rank.
        lora_dropout: dropout in front of LoRA.
        lora_target_modules: module names, or "all-linear".
        pooling: mean, weighted_mean, first or last; or latent_attention, a trained layer in front of the mean
            (NV-Embed, arXiv 2405.17428); or the dotted path of your own function, such as my_file.max_pool.
        attention: attention while embedding.
        dtype: of the weights: auto (as stored), float32, bfloat16, float16, float64. Adapters stay in float32.
        attn_implementation: transformers' choice (sdpa, eager, flash_attention_2 ...); null lets it choose.
        trust_remote_code: run code that comes with the model.
        family_code: a module of yours to import first, which registers a family with transformers' Auto classes.
        gradient_checkpointing: recompute the layers in backward instead of keeping their activations; auto does so
            only where training would not fit otherwise.
        compile: run the decoder layers through torch.compile; the first steps then take a minute or more.
        attention_path: how bidirectional attention reaches the layers; auto takes the first that passes the probe.
        probe: check at load time that attention is what it should be; false trusts attention_path.
        attention_dropout: on attention weights while training; null keeps the LLM's own.
        init_from: a run, checkpoint or adapter folder to start from; null starts from the LLM.
        init_mode: merge what that run trained into the LLM, and train anew on top; or continue to train the same
            weights.
        latents: learned vectors of latent_attention pooling.
        latent_heads: heads of it.
        quantization: nf4 or int8 keeps the frozen LLM in 4 or 8 bits (a GPU and the extra ``quantization``), or none.

    Raises:
        ValueError: an option is out of its range.
    """

    model_name_or_path: str
    model_backbone_type: str | None = None
    lora_name: str | None = "ullme"
    train: Trained | None = None
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.2
    lora_target_modules: str | list[str] = "all-linear"
    pooling: str = "mean"
    attention: Attention = "bidirectional"
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    family_code: str | None = None
    gradient_checkpointing: bool | Literal["auto"] = False
    compile: bool = False
    attention_path: AttentionPath = "auto"
    probe: bool = True
    quantization: Quantization = "none"
    attention_dropout: float | None = None
    init_from: str | None = None
    init_mode: InitMode = "merge"
    latents: int = 512
    latent_heads: int = 8

    def __post_init__(self) -> None:
        def need(ok: bool, option: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"{option}={getattr(self, option)!r}: {remedy}")

        need(bool(self.model_name_or_path), "model_name_or_path", "name a hub model or a local folder")
        ways = f"choose one of {', '.join(POOLINGS)}, or give module.name of a function of your own"
        need(self.pooling in POOLINGS or "." in self.pooling, "pooling", ways)
        if "." in self.pooling:
            own_pooling(self.pooling)
        need(self.attention in ("bidirectional", "causal"), "attention", "choose bidirectional or causal")
        need(self.dtype in DTYPES, "dtype", f"choose one of {', '.join(DTYPES)}")
        need(self.quantization in ("none", "nf4", "int8"), "quantization", "choose none, nf4 or int8")
        need(
            self.attention_path in ("auto", "packed", "padded", "flags", "mask4d"),
            "attention_path",
            "choose auto, packed, padded, flags or mask4d",
        )
        need(self.train in (None, "lora", "biases", "all"), "train", "choose lora, biases or all")
        need(
            self.train is None or (self.train == "lora") == (self.lora_name is not None),
            "train",
            f"with lora_name={self.lora_name!r}; lora needs a lora_name, biases and all need lora_name: null",
        )
        need(self.init_mode in INIT_MODES, "init_mode", f"choose {' or '.join(INIT_MODES)}")
        need(self.latents >= 1, "latents", "at least 1")
        need(self.latent_heads >= 1, "latent_heads", "at least 1")
        if self.attention_dropout is not None:
            need(0 <= self.attention_dropout < 1, "attention_dropout", "a share from 0 to below 1")
        if self.lora_name is not None:
            need(
                bool(self.lora_name) and "." not in self.lora_name,
                "lora_name",
                "a name without dots, or null to train all weights",
            )
            need(self.lora_r >= 1, "lora_r", "a positive rank; lora_name: null trains all weights")
            need(self.lora_alpha > 0, "lora_alpha", "a positive number; usually twice lora_r")
            need(0 <= self.lora_dropout < 1, "lora_dropout", "a share from 0 to below 1")

    @property
    def trained(self) -> Trained:
        """What is trained, said or not."""
        return self.train or ("all" if self.lora_name is None else "lora")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    from transformers.pytorch_utils import Conv1D

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
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores (in, out)
    )
    try:
        with lora_layers.without_deprecation_warning():
            wrapped = get_peft_model(model, lora, adapter_name=options.lora_name)
    except ValueError as error:
        raise ValueError(f"lora_target_modules={options.lora_target_modules!r}: {error}") from error
    lora_layers.install(wrapped)
    return wrapped


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
