"""PEFT adapter folders as a source of trained weights, ours or another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ullme.prompts import Prompts

CONTRACT_FILE = "ullme.json"
POOLER_FILE = "pooler.safetensors"


def read_adapter_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contract (the defaults where the folder has none) and the weights, by the names they have in the model.

    Raises:
        ValueError: something is missing, damaged, or not rebuilt here.
    """
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"checkpoint={str(folder)!r}: adapter_model.safetensors is missing; only safetensors are read")
    try:
        peft = json.loads((folder / "adapter_config.json").read_text())
        own = folder / CONTRACT_FILE
        found = json.loads(own.read_text()) if own.is_file() else None
        tensors = load_file(weights)
        pooler = load_file(folder / POOLER_FILE) if (folder / POOLER_FILE).is_file() else {}
    except Exception as error:
        raise ValueError(f"checkpoint={str(folder)!r} is damaged ({type(error).__name__}: {error})") from error
    special = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save")
    if odd := [key for key in special if peft.get(key)]:
        raise ValueError(
            f"checkpoint={str(folder)!r}: the adapter uses {', '.join(odd)}, which is not rebuilt here; merge it into "
            "its LLM first and give the merged folder as the model"
        )
    if found is None:
        targets = peft.get("target_modules")
        backbone = {
            "model_name_or_path": peft.get("base_model_name_or_path"),
            "lora_name": "default",
            "lora_r": peft["r"],
            "lora_alpha": peft["lora_alpha"],
            "lora_target_modules": targets,
        }
        found = {"backbone": backbone, "prompts": Prompts().to_dict()}
    name = found["backbone"]["lora_name"]
    # PEFT leaves the adapter's name out of a folder: ...lora_A.weight is ...lora_A.<name>.weight in the model.
    state = {f"llm.{k.removesuffix('.weight')}.{name}.weight": v for k, v in tensors.items()}
    return found, {**state, **{f"pooler.{k}": v for k, v in pooler.items()}}
