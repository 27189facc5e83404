"""How many GPUs a training takes."""

from __future__ import annotations

from typing import Any

from ullme.planning.devices import number_of


def count() -> int:
    """How many there are."""
    import torch

    return torch.cuda.device_count()


def wanted(trainer: Any) -> int | str | None:
    """Of a configured trainer; "auto" for all there are; None: it runs on the CPU."""
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not count()):
        return None
    return number_of(trainer.devices)


def renumbered(trainer: Any) -> list[str]:
    """A cell sees its own GPUs alone, numbered from 0 on: the option that says how many, where they are named."""
    return [f"--trainer.devices={wanted(trainer)}"] if _are_named(trainer.devices) and wanted(trainer) else []


def _are_named(devices: Any) -> bool:
    return isinstance(devices, list) or (isinstance(devices, str) and "," in devices)
