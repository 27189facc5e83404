"""Lightning checkpoint IO that writes atomically and verifies checksums when reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from ullme.models.trained_weights import check_contract
from ullme.utils import atomic_files


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints completely or not at all; reads them without running code, after verifying checksums."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save atomically. Raises: ValueError: it cannot be written; the message names the last intact checkpoint."""
        atomic_files.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load with ``weights_only=True``, whatever is passed.

        Raises:
            ValueError: damaged, holding objects other than plain values, or not written by this package.
        """
        content = atomic_files.read(path, "cpu" if map_location is None else map_location)
        check_contract(content, path)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file, if it exists."""
        Path(path).unlink(missing_ok=True)


def install_atomic_io(trainer: L.Trainer) -> None:
    """Replace the trainer's default checkpoint IO, also inside a wrapper such as AsyncCheckpointIO."""
    wrapper = trainer.strategy.checkpoint_io
    if isinstance(wrapper, _WrappingCheckpointIO):
        while isinstance(wrapper._checkpoint_io, _WrappingCheckpointIO):
            wrapper = wrapper._checkpoint_io
        if wrapper._checkpoint_io is None or type(wrapper._checkpoint_io) is TorchCheckpointIO:
            wrapper._checkpoint_io = AtomicCheckpointIO()
    elif type(wrapper) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
