"""The dtype in which evaluate and export load a model, where the user gives none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ullme.models.peft_folder import CONTRACT_FILE
from ullme.models.trained_weights import CONTRACT_KEY, find_checkpoint
from ullme.utils import atomic_files
from ullme.utils.precision import loading_dtype, stored_dtype


def dtype_to_load(model: str | None, checkpoint: str | Path | None, asked: str | None, device: str) -> str | None:
    """The dtype to load with, so that no CPU computes slowly in half precision because weights are stored in it.

    Args:
        model: hub name or folder of the LLM, or of an adapter.
        checkpoint: run folder, checkpoint file or adapter folder.
        asked: of the user; None takes the training's dtype, auto that of the stored weights.
        device: "cpu", or any other.

    Returns:
        ``asked``, or float32 in its place.
    """
    if device != "cpu" or asked not in (None, "auto"):
        return asked
    chosen = loading_dtype("auto", known_dtype(model, checkpoint, asked), device)
    return "float32" if chosen == "float32" else asked


def known_dtype(model: str | None, checkpoint: str | Path | None, asked: str | None = None) -> str | None:
    """The dtype that weights would be loaded in: the training's, or that of the stored weights; None if not known.

    Args:
        model: as for :func:`dtype_to_load`.
        checkpoint: as for :func:`dtype_to_load`.
        asked: auto leaves the training's dtype out of it.
    """
    from ullme.models.loading import adapter_folder  # which imports transformers

    if checkpoint is None and model is not None and (adapter := adapter_folder(model)) is not None:
        model, checkpoint = None, adapter
    trained: dict[str, Any] = {} if checkpoint is None else _backbone(checkpoint)
    if asked is None and trained.get("dtype", "auto") != "auto":
        return trained["dtype"]
    name = model or trained.get("model_name_or_path")
    return None if name is None else stored_dtype(name, download=True)


def _backbone(checkpoint: str | Path) -> dict[str, Any]:
    """The backbone options that a checkpoint was trained with; empty where it cannot be read, which loading reports."""
    try:
        path = find_checkpoint(checkpoint)
        if not path.is_dir():
            return atomic_files.checked(path)[CONTRACT_KEY]["backbone"]
        if (path / CONTRACT_FILE).is_file():
            return json.loads((path / CONTRACT_FILE).read_text(encoding="utf-8"))["backbone"]
        peft = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        return {"model_name_or_path": peft.get("base_model_name_or_path")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
