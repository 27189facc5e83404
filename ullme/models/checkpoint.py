"""An embedder from a checkpoint, an adapter folder or the name of an LLM, and an adapter back into a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ullme.models.config import BackboneConfig
from ullme.models.trained_weights import CONTRACT_FILE, POOLER_FILE, contract, fit_weights, read_checkpoint
from ullme.models.ullme import ULLME
from ullme.prompts import Prompts


def load_ullme(checkpoint: str | Path, strict: bool = False, **overrides: Any) -> ULLME:
    """Rebuild a trained model in eval mode.

    Args:
        checkpoint: a run folder, a ``.ckpt`` file or a PEFT adapter folder.
        strict: refuse a backbone with other weights than the training's, in place of a warning.
        **overrides: backbone options that replace the stored ones, such as ``model_name_or_path`` or ``dtype``.

    Raises:
        ValueError: unreadable checkpoint, or weights that do not fit.
    """
    found, state = read_checkpoint(checkpoint)
    known = {field.name for field in fields(BackboneConfig)}
    if unknown := sorted(set(found["backbone"]) - known):
        raise ValueError(f"checkpoint={str(checkpoint)!r} was written by another version: it has the options {unknown}")
    # Whether code that is not this package's may run is for whoever loads the file to say, never for the file.
    options = {**found["backbone"], "trust_remote_code": False, "family_code": None, **overrides}
    if "." in found["backbone"].get("pooling", "mean") and "pooling" not in overrides:
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} pools with a function of its own; to run it, say so: "
            f"pooling={found['backbone']['pooling']!r}"
        )
    model = ULLME(**options, prompts=Prompts.from_dict(found["prompts"]))
    fit_weights(model, found, state, checkpoint, strict)
    return model.eval()


def load_weights(model: ULLME, checkpoint: str | Path) -> None:
    """Put trained weights, and the prompts they were trained with, into a model that is already built.

    Raises:
        ValueError: unreadable checkpoint, another backbone, another rank.
    """
    found, state = read_checkpoint(checkpoint)
    model.prompts = Prompts.from_dict(found["prompts"])
    fit_weights(model, found, state, checkpoint)


def save_adapter(model: ULLME, folder: str | Path) -> Path:
    """Write the trained adapter as a PEFT folder, with the contract in ``ullme.json``, the tokenizer and, where the
    pooling has trained weights, these in a file of their own.

    Raises:
        ValueError: all weights were trained, so there is no adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = model.options.lora_name
    if name is None:
        raise ValueError(
            f"lora_name=null: {model.options.trained} of the LLM were trained, there is no adapter to save"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model.llm, adapter_name=name)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    if model.pooler is not None:
        pooler = {k: v.detach().cpu().contiguous() for k, v in model.pooler.state_dict().items()}
        save_file(pooler, folder / POOLER_FILE)
    model.llm.peft_config[name].save_pretrained(folder)  # type: ignore[union-attr,index]
    model.tokenizer.save_pretrained(folder)
    (folder / CONTRACT_FILE).write_text(json.dumps(contract(model), indent=2))
    return folder


def usable_device(device: str | None) -> str:
    """The device asked for, or else a GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}); leave it out or give cpu") from error
    return device


def load_embedder(name: str | None, checkpoint: str | Path | None, options: Mapping[str, Any]) -> ULLME:
    """A trained model, or an LLM as it is.

    Args:
        name: hub name or folder of the LLM; None takes the one that the checkpoint was trained from.
        checkpoint: run folder, ``.ckpt`` file or PEFT folder; None takes the LLM untrained.
        options: of :class:`~ullme.models.config.BackboneConfig`, and ``prompts``: the contract, or a mapping with
            its fields to replace.

    Raises:
        ValueError: neither, or a checkpoint that cannot be read or does not fit.
    """
    options = dict(options)
    prompts = options.pop("prompts", None)
    if checkpoint is None:
        if name is None:
            raise ValueError("neither a model nor a checkpoint was named; give at least one of them")
        # Without a checkpoint an adapter would be at its start, where it changes nothing.
        plain = {option: value for option, value in options.items() if not option.startswith("lora_")}
        model = ULLME(name, lora_name=None, **plain)
    else:
        named: dict[str, Any] = {} if name is None else {"model_name_or_path": name}
        model = load_ullme(checkpoint, **named, **options)
    if isinstance(prompts, Mapping):
        prompts = Prompts.from_dict({**model.prompts.to_dict(), **prompts})
    if prompts is not None:
        model.prompts = prompts
    return model
