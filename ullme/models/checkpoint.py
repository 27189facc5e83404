"""Load an embedding model from a checkpoint, an adapter folder or an LLM, and save an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ullme.models.peft_folder import CONTRACT_FILE, POOLER_FILE
from ullme.models.trained_weights import (
    check_saved,
    contract,
    copy_weights,
    read_checkpoint,
    rebuild_model,
    stored_dims,
)
from ullme.models.ullme import ULLME
from ullme.prompts import Prompts


def load_ullme(checkpoint: str | Path, strict: bool = False, **overrides: Any) -> ULLME:
    """Load a trained model, in eval mode.

    Args:
        checkpoint: a run folder, a ``.ckpt`` file or a PEFT adapter folder.
        strict: raise, instead of warning, if the LLM has other weights than in training.
        **overrides: backbone options that replace the stored ones, such as ``model_name_or_path`` or ``dtype``.

    Raises:
        ValueError: unreadable checkpoint, or weights that do not fit.
    """
    return rebuild_model(ULLME, checkpoint, strict, **overrides)


def load_weights(model: ULLME, checkpoint: str | Path) -> None:
    """Load trained weights, and the prompts they were trained with, into an existing model.

    Raises:
        ValueError: unreadable checkpoint, another LLM, or other LoRA options.
    """
    stored, state = read_checkpoint(checkpoint)
    model.prompts = Prompts.from_dict(stored["prompts"])
    model.matryoshka_dims = stored_dims(stored)
    copy_weights(model, stored, state, checkpoint)


def save_adapter(model: ULLME, folder: str | Path) -> Path:
    """Save the trained adapter as a PEFT folder, with the tokenizer, the contract in ``ullme.json`` and, if the pooling
    has trained weights, these in ``pooler.safetensors``.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no adapter, or what was written cannot be read again.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = model.options.lora_name
    if name is None:
        raise ValueError(
            f"lora_name=null: {model.options.trained} weights of the LLM were trained, so there is no adapter to save; "
            "use the checkpoint itself"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # without the copy of the frozen embedding that PEFT would write beside an adapter on it
    state = get_peft_model_state_dict(model.llm, adapter_name=name, save_embedding_layers=False)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    if model.pooler is not None:
        pooler = {k: v.detach().cpu().contiguous() for k, v in model.pooler.state_dict().items()}
        save_file(pooler, folder / POOLER_FILE)
    model.llm.peft_config[name].save_pretrained(folder)  # type: ignore[union-attr,index]
    model.tokenizer.save_pretrained(folder)
    (folder / CONTRACT_FILE).write_text(json.dumps(contract(model), indent=2))
    check_saved(model, folder)
    return folder


def usable_device(device: str | None) -> str:
    """Check a device; without one, choose a GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device on this machine.
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
    """Load a trained model, or an LLM without training.

    Args:
        name: hub name or folder of the LLM; None takes the one the checkpoint was trained from.
        checkpoint: run folder, ``.ckpt`` file or PEFT folder; None takes the LLM untrained.
        options: fields of :class:`~ullme.models.config.BackboneConfig`, and ``prompts``: a prompt contract, or a
            mapping with the fields of it to replace.

    Raises:
        ValueError: neither name nor checkpoint, or a checkpoint that cannot be read or does not fit.
    """
    options = dict(options)
    prompts = options.pop("prompts", None)
    if checkpoint is None:
        if name is None:
            raise ValueError("neither a model nor a checkpoint was named; give at least one of them")
        # An untrained adapter would change nothing, so there is none.
        backbone = {option: value for option, value in options.items() if not option.startswith("lora_")}
        model = ULLME(name, lora_name=None, **backbone)
    else:
        llm: dict[str, Any] = {} if name is None else {"model_name_or_path": name}
        model = load_ullme(checkpoint, **llm, **options)
    if isinstance(prompts, Mapping):
        prompts = Prompts.from_dict({**model.prompts.to_dict(), **prompts})
    if prompts is not None:
        model.prompts = prompts
    return model
