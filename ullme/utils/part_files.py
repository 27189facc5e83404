"""A result that is written in parts, so that a command that was stopped goes on with the parts that are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ullme.utils import atomic_files

SETTINGS = "settings.json"


class PartFiles:
    """A folder with ``part-00000.jsonl`` ... and ``settings.json``, each there whole or not at all.

    Args:
        folder: new, or of an earlier command.
        content: what is in the parts, for messages.
    """

    def __init__(self, folder: Path, content: str) -> None:
        self.folder, self.content = folder, content

    def check(self, settings: dict[str, Any]) -> None:
        """Write down what the parts depend on, or compare it with what is there.

        Args:
            settings: option -> value, as JSON.

        Raises:
            ValueError: the parts are of another command, or the folder cannot be written.
        """
        path = self.folder / SETTINGS
        atomic_files.sweep(self.folder)
        if not path.exists():
            atomic_files.write_text(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n", "--to")
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove {self.folder} and run the command again") from None
        for name in sorted({*there, *settings}):
            if there.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.folder} holds {self.content} of another command: {name} was {there.get(name)!r:.80} and is "
                    f"{settings.get(name)!r:.80} now; give another --to, remove the folder, or give the same options "
                    "to go on"
                )

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:05d}.jsonl"

    def write(self, number: int, text: str) -> None:
        """Write a part. Raises: StorageError: it cannot be written."""
        atomic_files.write_text(self.path(number), text, "--to")
