"""How many GPUs a training takes."""

from __future__ import annotations

from typing import Any


def count() -> int:
    """How many there are."""
    import torch

    return torch.cuda.device_count()


def wanted(trainer: Any) -> int | str | None:
    """Of a configured trainer; "auto" for all there are; None: it runs on the CPU."""
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not count()):
        return None
    devices = trainer.devices
    if _are_named(devices):
        return len(devices) if isinstance(devices, list) else len([one for one in devices.split(",") if one.strip()])
    return "auto" if str(devices) in ("auto", "-1") else int(devices)


def renumbered(trainer: Any) -> list[str]:
    """A cell sees its own GPUs alone, numbered from 0 on: the option that says how many, where they are named."""
    return [f"--trainer.devices={wanted(trainer)}"] if _are_named(trainer.devices) and wanted(trainer) else []


def _are_named(devices: Any) -> bool:
    return isinstance(devices, list) or (isinstance(devices, str) and "," in devices)
