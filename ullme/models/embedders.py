"""An embedder from a name, a checkpoint or both, as evaluation and export take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ullme.prompts import Prompts

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME


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
    from ullme.models.ullme import ULLME

    options = dict(options)
    prompts = options.pop("prompts", None)
    if checkpoint is None:
        if name is None:
            raise ValueError("neither a model nor a checkpoint was named; give at least one of them")
        # Without a checkpoint an adapter would be at its start, where it changes nothing.
        plain = {option: value for option, value in options.items() if not option.startswith("lora_")}
        model = ULLME(name, lora_name=None, **plain)
    else:
        from ullme.models.checkpoint import load_ullme

        named: dict[str, Any] = {} if name is None else {"model_name_or_path": name}
        model = load_ullme(checkpoint, **named, **options)
    if isinstance(prompts, Mapping):
        prompts = Prompts.from_dict({**model.prompts.to_dict(), **prompts})
    if prompts is not None:
        model.prompts = prompts
    return model
