"""Lightning's checkpoints on disk: written whole or not at all, checked when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from ullme.models.trained_weights import check_contract
from ullme.utils import atomic_files


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are written whole or not at all, checked when read, and never run as code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises: ValueError: it cannot be written; the message names the last good one."""
        atomic_files.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """``weights_only`` is always true. Raises: ValueError: damaged, holding more than plain values, or not ours."""
        found = atomic_files.read(path, "cpu" if map_location is None else map_location)
        check_contract(found, path)
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def install_atomic_io(trainer: L.Trainer) -> None:
    """Replace the trainer's plain checkpoint IO, also inside a wrapper such as AsyncCheckpointIO."""
    outer = trainer.strategy.checkpoint_io
    if isinstance(outer, _WrappingCheckpointIO):
        while isinstance(outer._checkpoint_io, _WrappingCheckpointIO):
            outer = outer._checkpoint_io
        if outer._checkpoint_io is None or type(outer._checkpoint_io) is TorchCheckpointIO:
            outer._checkpoint_io = AtomicCheckpointIO()
    elif type(outer) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
