"""What kind of model a name stands for, and what its results are filed under."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


def is_sentence_transformer(name: str) -> bool:
    """Whether a folder, a cached hub model or, unless offline, a hub model holds a modules.json."""
    from huggingface_hub import constants, file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (folder := Path(name)).is_dir():
        return (folder / "modules.json").is_file()
    try:
        if isinstance(try_to_load_from_cache(name, "modules.json"), str):
            return True
        return not constants.is_offline_mode() and file_exists(name, "modules.json")
    except (HFValidationError, OSError):
        # Not a hub name, or a hub out of reach: loading the LLM will say so in its own words.
        return False


def result_name(model_name: str, checkpoint: str | Path | None) -> str:
    """``organisation/model`` as mteb wants it, the checkpoint's run and file behind: ``local/llama--my-run``.

    A Lightning checkpoint ``my-run/checkpoints/last.ckpt`` gives ``my-run-last``.
    """
    local = os.path.isdir(model_name) or model_name.count("/") != 1
    name = f"local/{Path(model_name).resolve().name}" if local else model_name
    if checkpoint is not None:
        path = Path(checkpoint).resolve()
        parts = [path.name] if path.is_dir() else [_run_folder(path).name, path.stem]
        name = f"{name}--{'-'.join(parts)}"
    return re.sub(r"[^\w./-]+", "_", name)


def _run_folder(file: Path) -> Path:
    return next((folder for folder in file.parents if folder.name != "checkpoints"), file.parent)


def weights_digest(module: nn.Module) -> bytes:
    """SHA-256 over the names, types, shapes and values of all weights, in order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.digest()
