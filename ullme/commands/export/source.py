"""Where an exported model comes from: its checkpoint, configuration and number of training steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ullme.models.trained_weights import CONTRACT_KEY, find_checkpoint
from ullme.training.resume import CONFIG_FILE, redacted
from ullme.utils import atomic_files

# The copy of a run's configuration in an exported folder.
CONFIG_COPY = "training_config.yaml"


@dataclass(frozen=True)
class Source:
    """The origin of a model.

    Args:
        checkpoint: a ``.ckpt`` file or a PEFT folder; None for an LLM that was not trained.
        config: the run's configuration without secrets, if it is beside the checkpoint.
        step: optimizer steps up to the checkpoint, where it says so.
        quantization: of the run.
        merged_from: an earlier run that this one was built on.
    """

    checkpoint: Path | None = None
    config: dict[str, Any] | None = None
    step: int | None = None
    quantization: str = "none"
    merged_from: str | None = None


def find_source(run: str | Path) -> Source:
    """Read a run's origin without building its model.

    Raises:
        ValueError: there is no checkpoint, or it was not written by ullme.
    """
    path = find_checkpoint(run)
    step = None
    if path.is_dir():
        own = path / "ullme.json"
        backbone = _json(own)["backbone"] if own.is_file() else {}
    else:
        stored = atomic_files.checked(path)
        if not isinstance(stored, dict) or CONTRACT_KEY not in stored:
            raise ValueError(f"{str(path)!r} was not written by ullme; give a run folder, a .ckpt or a PEFT folder")
        backbone, step = stored[CONTRACT_KEY]["backbone"], stored.get("global_step")
    places = [path, path.parent, path.parent.parent] if path.is_dir() else [path.parent, path.parent.parent]
    files = [place / name for place in places for name in (CONFIG_FILE, CONFIG_COPY)]
    file = next((file for file in files if file.is_file()), None)
    return Source(
        checkpoint=path,
        config=None if file is None else _config(file),
        step=step,
        quantization=backbone.get("quantization", "none"),
        merged_from=backbone.get("init_from"),
    )


def _config(file: Path) -> dict[str, Any] | None:
    """A run's configuration; None for the config.yaml of another program."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return redacted(content) if isinstance(content, dict) and "model" in content else None


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error})") from error
