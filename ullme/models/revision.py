"""A hash over everything that an embedding depends on: the revision under which scores are filed."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ullme.utils.dotted_names import named

if TYPE_CHECKING:
    from torch import nn

    from ullme.models.ullme import ULLME

# Fields of an LLM's config that change no embedding.
_CONFIG_WITHOUT_EFFECT = (
    *("_name_or_path", "transformers_version", "use_cache", "architectures", "torch_dtype", "dtype"),
    *("id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict"),
)
# Options of a model that change no embedding, or only through its weights. Every other one counts.
_OPTIONS_WITHOUT_EFFECT = (
    *("model_name_or_path", "model_backbone_type", "lora_name", "lora_dropout", "lora_target_modules", "train"),
    *("attention_dropout", "llm_dropout", "gradient_checkpointing", "compile", "probe", "attention_path"),
    *("attn_implementation", "init_from", "init_mode", "trust_remote_code", "family_code", "dtype"),
)


def revision(model: Any, settings: dict[str, Any]) -> str:
    """12 hexadecimal digits that change with whatever changes an embedding.

    Args:
        model: a :class:`~ullme.models.ULLME`, or a sentence-transformers model.
        settings: how it is used: max_length, instructions ...
    """
    describe = ullme_description if hasattr(model, "options") else sentence_transformer_description
    content = {"settings": settings, **describe(model)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    digest.update(weights_digest(model))
    return digest.hexdigest()[:12]


def ullme_description(model: ULLME) -> dict[str, Any]:
    """Options, prompts, config and tokenizer of a model, and the code of a pooling of the user."""
    options = {key: v for key, v in model.options.to_dict().items() if key not in _OPTIONS_WITHOUT_EFFECT}
    if model.options.lora_name is None:
        options = {key: v for key, v in options.items() if not key.startswith("lora_")}
    pooling = model.options.pooling
    return {
        "options": options,
        "prompts": model.prompts.to_dict(),
        "config": config_description(model.causal_lm.config),
        "tokenizer": tokenizer_description(model.tokenizer),
        "pooling code": inspect.getsource(named(pooling, "pooling")) if "." in pooling else None,
    }


def sentence_transformer_description(model: Any) -> dict[str, Any]:
    """The modules of a sentence-transformers model with their settings, its prompts and its similarity.

    A module may hold others with settings of their own, as a Router does.
    """
    modules = []
    outer = {id(model), *map(id, model)}
    inner = [one for one in model.modules() if id(one) not in outer and hasattr(one, "get_config_dict")]
    for module in [*model, *inner]:
        kind = type(module)
        own = module.get_config_dict() if hasattr(module, "get_config_dict") else None
        llm, tokenizer = getattr(module, "auto_model", None), getattr(module, "tokenizer", None)
        modules.append(
            {
                "type": f"{kind.__module__}.{kind.__qualname__}",
                "settings": own,
                "config": None if llm is None else config_description(llm.config),
                "tokenizer": tokenizer_description(tokenizer) if hasattr(tokenizer, "get_vocab") else None,
            }
        )
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    return {"modules": modules, **{name: getattr(model, name, None) for name in names}}


def config_description(config: Any) -> dict[str, Any]:
    """The fields of an LLM's config, as it is in memory, that an embedding may depend on."""
    return {key: value for key, value in config.to_dict().items() if key not in _CONFIG_WITHOUT_EFFECT}


def tokenizer_description(tokenizer: Any) -> dict[str, Any]:
    """How a tokenizer turns a text into token ids: its vocabulary, rules, special tokens and sides."""
    sides = {name: getattr(tokenizer, name, None) for name in ("padding_side", "truncation_side")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any
    if backend is None:
        ignored = ("name_or_path", "tokenizer_file", "vocab_file", "chat_template")
        rules = {key: str(value) for key, value in tokenizer.init_kwargs.items() if key not in ignored}
        vocabulary = {"tokens": tokenizer.get_vocab(), "files": _vocabulary_files(tokenizer)}
    else:
        rules = json.loads(backend.to_str())
        vocabulary = None
        for state in ("truncation", "padding"):  # of the last call
            rules.pop(state, None)
    return {"class": type(tokenizer).__name__, **sides, "special": special, "rules": rules, "vocabulary": vocabulary}


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of each file that a tokenizer without a backend saves: merges, or the model of a SentencePiece."""
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer.save_vocabulary(folder) or ()
        return {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def weights_digest(module: nn.Module) -> bytes:
    """SHA-256 of the names, dtypes, shapes and values of all weights, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.digest()
