"""Trained weights to and from disk: Lightning checkpoints and PEFT folders, with the contract that goes with them.

Only what was trained is stored, never the frozen LLM. The contract (backbone options and prompts) lies beside the
weights, so that a checkpoint alone rebuilds its model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullme.models.config import BackboneConfig
from ullme.prompts import Prompts
from ullme.utils import atomic_files

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME

logger = logging.getLogger(__name__)

CONTRACT_KEY = "ullme"
# Beside an adapter in a PEFT folder: the contract, and the pooling's own weights.
CONTRACT_FILE = "ullme.json"
POOLER_FILE = "pooler.safetensors"
# The attribute of the LightningModule that holds the model, in front of every name in a Lightning checkpoint.
STATE_PREFIX = "model."


def contract(model: ULLME) -> dict[str, Any]:
    """What rebuilds the model around its trained weights: plain values only."""
    config = model.causal_lm.config.get_text_config()
    shape = {
        key: getattr(config, key, None) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    }
    return {
        "version": 1,
        "backbone": _rebuilding_options(model.options),
        "prompts": model.prompts.to_dict(),
        "shape": shape,
        "fingerprint": model.fingerprint,
    }


def _rebuilding_options(options: BackboneConfig) -> dict[str, Any]:
    """A run that continued another holds all that was trained; one that merged another is built on it."""
    values = options.to_dict()
    if options.init_from is not None:
        merged = options.init_mode == "merge"
        values["init_from"] = str(Path(options.init_from).resolve()) if merged else None
        values["init_mode"] = "merge"
    return values


def trainable_shapes(model: ULLME) -> dict[str, torch.Size]:
    """Name -> shape of every trained weight as it is in one piece, also once the model is split."""
    known: dict[str, torch.Size] | None = getattr(model, "_whole_shapes", None)
    return known or {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def trainable_state(model: ULLME) -> dict[str, Tensor]:
    """Name -> trained weight."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint file as it is; in a run folder the best, else the last, else the newest; a PEFT folder as it is.

    Raises:
        ValueError: nothing there.
    """
    path = Path(path)
    if path.is_file() or (path / "adapter_config.json").is_file():
        return path
    found = atomic_files.newest_first(path) if path.is_dir() else []
    if not found:
        raise ValueError(
            f"checkpoint={str(path)!r}: no such file, or a folder without *.ckpt and without adapter_config.json; "
            "give a run folder, a .ckpt file or a PEFT adapter folder"
        )
    last = next((p for p in found if p.stem == "last"), found[0])
    chosen = _best(last, found) or last
    logger.info("checkpoint %s: taking %s", path, chosen)
    return chosen


def _best(last: Path, found: list[Path]) -> Path | None:
    """The best by the validation metric, as the run's last checkpoint remembers it, if it is still there."""
    named = [p for p in found if p.stem.startswith("best")]
    if len(named) < 2:
        return named[0] if named else None
    callbacks = atomic_files.read(last).get("callbacks", {}).values()
    best = {Path(state["best_model_path"]).name for state in callbacks if state.get("best_model_path")}
    return next((p for p in named if p.name in best), named[0])


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contract and the trained weights of a checkpoint. Nothing in the file is run as code.

    Raises:
        ValueError: unreadable, or not written by this project.
    """
    path = find_checkpoint(path)
    if path.is_dir():
        return read_adapter_folder(path)
    stored = atomic_files.read(path)
    check_contract(stored, path)
    state = {name.removeprefix(STATE_PREFIX): value for name, value in stored["state_dict"].items()}
    return stored[CONTRACT_KEY], state


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


def check_contract(stored: Any, source: str | Path) -> None:
    """Raises: ValueError: the content of a file is no checkpoint of ours."""
    if not isinstance(stored, dict) or CONTRACT_KEY not in stored:
        raise ValueError(f"checkpoint={str(source)!r} was not written by ullme: it holds no {CONTRACT_KEY!r} contract")


def fit_weights(
    model: ULLME, found: dict[str, Any], state: dict[str, Tensor], source: str | Path, strict: bool = False
) -> None:
    """Copy weights by name; every trainable weight must be there with its shape, and nothing else.

    Args:
        model: to copy into.
        found: the contract that the weights came with.
        state: the weights.
        source: where both came from, for messages.
        strict: as for :func:`load_ullme`.

    Raises:
        ValueError: they do not fit.
    """
    renamed = _with_adapter_name(state, found["backbone"].get("lora_name"), model.options.lora_name)
    renamed = _under_the_head(renamed, trainable_shapes(model))
    _check_fit(model, found, renamed, source)
    if other := _other_backbone(model, found):
        if strict:
            raise ValueError(other)
        logger.warning("checkpoint %s: %s", source, other)
    with torch.no_grad():
        for name, parameter in trainable_state(model).items():
            parameter.copy_(renamed[name])


def check_fit(model: ULLME, checkpoint: dict[str, Any], source: str = "ckpt_path") -> None:
    """Before a run is resumed: the same backbone, the same adapter, the same prompts.

    Args:
        model: the model of the run.
        checkpoint: a Lightning checkpoint, as read.
        source: where it came from, for the message.

    Raises:
        ValueError: something differs.
    """
    check_contract(checkpoint, source)
    found = checkpoint[CONTRACT_KEY]
    state = {name.removeprefix(STATE_PREFIX): value for name, value in checkpoint["state_dict"].items()}
    if Prompts.from_dict(found["prompts"]) != model.prompts:  # an older contract lacks what is now at its default
        raise ValueError(
            f"checkpoint={source!r} was trained with model.prompts={found['prompts']}, this run has "
            f"{model.prompts.to_dict()}; resume with the prompts of the training"
        )
    for key in ("pooling", "attention"):
        if found["backbone"][key] != getattr(model.options, key):
            raise ValueError(
                f"checkpoint={source!r} was trained with {key}={found['backbone'][key]!r}, this run has "
                f"{getattr(model.options, key)!r}; resume with the {key} of the training"
            )
    _check_fit(model, found, state, source)
    if other := _other_backbone(model, found):
        raise ValueError(f"checkpoint={source!r}: {other}")


def _other_backbone(model: ULLME, found: dict[str, Any]) -> str | None:
    """What to say if the adapter was trained on other weights; they can only be compared in the same types."""
    stored = found["backbone"]
    own = model.options
    same = (stored.get("dtype"), stored.get("quantization", "none")) == (own.dtype, own.quantization)
    if same and found.get("fingerprint", model.fingerprint) != model.fingerprint:
        return (
            f"model_name_or_path={model.options.model_name_or_path!r} holds other weights than "
            f"{found['backbone']['model_name_or_path']!r}, on which this checkpoint was trained"
        )
    return None


def _check_fit(model: ULLME, found: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> None:
    mine = contract(model)
    adapter = mine["backbone"]["lora_name"] is not None
    for part, key in [("shape", key) for key in mine["shape"]] + [
        ("backbone", "lora_r"),
        ("backbone", "lora_alpha"),
    ] * adapter:
        theirs = found.get(part, {}).get(key)
        if theirs is not None and theirs != mine[part][key]:
            raise ValueError(
                f"checkpoint={str(source)!r} was trained with {key}={theirs!r}, but this model has "
                f"{key}={mine[part][key]!r}; load it into the backbone and LoRA options it was trained with"
            )
    own = trainable_shapes(model)
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or extra:
        raise ValueError(
            f"checkpoint={str(source)!r} does not fit the model: {len(missing)} weights missing {missing[:2]}, "
            f"{len(extra)} unknown {extra[:2]}; lora_target_modules and lora_name must be those of the training"
        )
    for name, shape in own.items():
        if shape != state[name].shape:
            raise ValueError(
                f"checkpoint={str(source)!r}: {name} has shape {tuple(state[name].shape)}, the model's is "
                f"{tuple(shape)}; lora_r must be that of the training"
            )


def _with_adapter_name(state: dict[str, Tensor], old: str | None, new: str | None) -> dict[str, Tensor]:
    """PEFT writes the adapter's name into every weight's name; another name makes no other weights."""
    if old is None or new is None or old == new:
        return state
    return {name.replace(f".{old}.", f".{new}."): value for name, value in state.items()}


def _under_the_head(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Embedders of others are often trained without the LM head: ``base_model.model.layers.0`` there is
    ``base_model.model.model.layers.0`` here, and the same weight."""
    names, front = set(own), "llm.base_model.model."
    for part in {name.removeprefix(front).split(".")[0] for name in names if name.startswith(front)}:
        moved = {name.replace(front, f"{front}{part}.", 1): value for name, value in state.items()}
        if not names & state.keys() and names & moved.keys():
            return moved
    return state
