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
    return _holds(name, "modules.json")


def adapter_folder(name: str) -> Path | None:
    """The PEFT adapter that a folder or a hub repository is, downloaded if need be; None where it is something else,
    such as an LLM with an adapter beside it."""
    if not _holds(name, "adapter_config.json") or _holds(name, "config.json"):
        return None
    if (folder := Path(name)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def _holds(name: str, file: str) -> bool:
    """Whether a folder, a cached hub repository or, unless offline, a hub repository holds a file."""
    from huggingface_hub import constants, file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (folder := Path(name)).is_dir():
        return (folder / file).is_file()
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return True
        return not constants.is_offline_mode() and file_exists(name, file)
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
