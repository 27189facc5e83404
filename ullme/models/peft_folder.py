"""Read a LoRA adapter from a PEFT folder, whoever wrote it, and refuse every adapter that is more than LoRA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ullme.models.sentence_transformers_files import read_settings
from ullme.prompts import Prompts

# In a PEFT folder, besides the adapter: the contract, and the weights of the pooler.
CONTRACT_FILE = "ullme.json"
POOLER_FILE = "pooler.safetensors"

# Keys of adapter_config.json that do not change what a loaded adapter computes.
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    # read only by the initialisation that is named in init_lora_weights
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Keys that are taken over into the options of the model.
_TAKEN_OVER = {
    *("r", "lora_alpha", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# Keys that PEFT sets by itself for the experts of a mixture of experts. They must equal those of the model.
EXPERT_KEYS = ("target_parameters", "rank_pattern", "alpha_pattern")
# Initialisations that leave the LLM's weights as they are.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# Initialisations that PEFT repeats when it loads the adapter, so that its merge_and_unload gives the right weights.
_REPEATED_INITIALISATIONS = ("pissa", "pissa_niter_", "olora")
# Further parts of an adapter that PEFT can merge into the LLM.
_MERGEABLE = {
    *("use_dora", "bias", "modules_to_save", "trainable_token_indices", *EXPERT_KEYS),
    *("ADALORA", "BOFT", "HRA", "IA3", "LOHA", "LOKR", "OFT", "VERA"),
}


def read_adapter_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the contract and the weights, under the names of the model's parameters.

    Without a contract the adapter comes from elsewhere. Then pooling and prompts are read from sentence-transformers'
    files, where they lie beside the adapter, and ``undeclared`` in the result names the options that the folder says
    nothing about.

    Raises:
        ValueError: a file is missing or damaged, or the adapter computes something else than LoRA.
    """
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"checkpoint={str(folder)!r}: adapter_model.safetensors is missing; only safetensors are read")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        contract_file = folder / CONTRACT_FILE
        stored = json.loads(contract_file.read_text(encoding="utf-8")) if contract_file.is_file() else None
        tensors = load_file(weights)
        pooler = load_file(folder / POOLER_FILE) if (folder / POOLER_FILE).is_file() else {}
    except Exception as error:
        raise ValueError(f"checkpoint={str(folder)!r} is damaged ({type(error).__name__}: {error})") from error
    _check_content(config, stored, folder)
    _check_is_lora(config, folder)
    if stored is None:
        stored = _foreign_contract(config, tensors, folder)
    stored["experts"] = {key: config.get(key) for key in EXPERT_KEYS}
    name = stored["backbone"]["lora_name"]
    state = {f"llm.{_parameter_name(key, name)}": value for key, value in tensors.items()}
    return stored, {**state, **{f"pooler.{k}": v for k, v in pooler.items()}}


def _check_content(config: Any, stored: Any, folder: Path) -> None:
    """Raises: ValueError: a JSON file does not hold what PEFT and ullme write there."""
    if not isinstance(config, dict):
        raise ValueError(f"checkpoint={str(folder)!r} is damaged: adapter_config.json holds no object with keys")
    contract = stored if isinstance(stored, dict) else {}
    backbone = contract.get("backbone")
    whole = isinstance(backbone, dict) and "lora_name" in backbone and isinstance(contract.get("prompts"), dict)
    if stored is not None and not whole:
        raise ValueError(
            f"checkpoint={str(folder)!r} is damaged: {CONTRACT_FILE} lacks the backbone options or the prompts; write "
            f"the folder again, or remove {CONTRACT_FILE} and say how the adapter embeds (pooling, attention, prompts)"
        )


def _parameter_name(key: str, adapter: str) -> str:
    """The name of a weight in the model: PEFT drops the adapter's name when saving.

    ``x.lora_A.weight`` is ``x.lora_A.<adapter>.weight``; ``x.lora_embedding_A`` is ``x.lora_embedding_A.<adapter>``.
    Other weights are copies of the LLM's own, such as an embedding that PEFT saves with its adapter.
    """
    module, _, last = key.rpartition(".")
    if last.startswith("lora_"):
        return f"{key}.{adapter}"
    return f"{module}.{adapter}.{last}" if module.rpartition(".")[2].startswith("lora_") else key


def _foreign_contract(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """A contract for an adapter from elsewhere."""
    experts = bool(config.get("target_parameters"))
    if not experts:
        for key in ("rank_pattern", "alpha_pattern"):
            if config.get(key):
                raise _not_lora(folder, f"{key}={config[key]!r}", key)
    targets: Any = config.get("target_modules")
    narrowed = any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if experts:
        targets = "all-linear"  # the only way in which this package adapts experts; compared with the model's later
    elif narrowed or not isinstance(targets, list):
        keys = [key.removeprefix("base_model.model.") for key in tensors if ".lora_" in key]
        targets = sorted({key.split(".lora_")[0] for key in keys})
    rank, alpha = (config.get(key, default) for key, default in (("r", 8), ("lora_alpha", 8)))  # PEFT's defaults
    backbone = {
        "model_name_or_path": config.get("base_model_name_or_path"),
        "lora_name": "default",
        "lora_r": rank,
        # rank-stabilised LoRA divides by the root of the rank (arXiv 2312.03732)
        "lora_alpha": alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
        "lora_target_modules": targets,
    }
    settings = read_settings(folder)
    undeclared = {"attention": "bidirectional", "pooling": "mean", "prompts": "ullme's default templates"}
    if settings is not None:
        backbone |= settings.backbone
        undeclared = settings.undeclared
    prompts = Prompts() if settings is None else settings.prompts
    return {"backbone": backbone, "prompts": prompts.to_dict(), "undeclared": undeclared}


def _check_is_lora(config: dict[str, Any], folder: Path) -> None:
    """Raises: ValueError: a key of adapter_config.json has a value with which the adapter computes more than LoRA."""
    from peft import LoraConfig

    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise _not_lora(folder, f"peft_type={kind!r}", kind)
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_INITIALISATIONS:
        repeated = str(start).lower().startswith(_REPEATED_INITIALISATIONS)
        changed = f"init_lora_weights={start!r}, with which training changed the LLM's own weights"
        raise _not_lora(folder, changed, "use_dora" if repeated else "")
    revision = config.get("revision")
    if revision not in (None, "main"):
        raise ValueError(
            f"checkpoint={str(folder)!r}: the adapter belongs to the revision {revision!r} of "
            f"{config.get('base_model_name_or_path')!r}, and other revisions than main are not loaded; download that "
            "revision, remove revision from adapter_config.json, and give its folder as model_name_or_path"
        )
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        known = key in _WITHOUT_EFFECT | _TAKEN_OVER or key in ("init_lora_weights", "revision", *EXPERT_KEYS)
        if not known and value and value != defaults.get(key):
            raise _not_lora(folder, f"{key}={value!r}", key)


def _not_lora(folder: Path, what: str, merged_by: str) -> ValueError:
    """An error for an adapter that is more than LoRA, with a way out that PEFT has for it.

    Args:
        folder: of the adapter.
        what: the key and its value.
        merged_by: the key or type of adapter; empty if PEFT cannot rebuild the adapter from the folder.
    """
    if merged_by in _MERGEABLE:
        remedy = (
            "merge it into its LLM with PEFT (AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()), "
            "save the result and the tokenizer with save_pretrained, and give that folder as model_name_or_path"
        )
    elif not merged_by:
        remedy = (
            "merge it in the program that trained it (merge_and_unload), save the result and the tokenizer with "
            "save_pretrained, and give that folder as model_name_or_path"
        )
    else:
        remedy = "it cannot be merged into its LLM either: embed with PEFT, or train a plain LoRA adapter"
    return ValueError(f"checkpoint={str(folder)!r}: the adapter has {what}, so it is not plain LoRA; {remedy}")
