"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "lightning")


def machine() -> str:
    """Processor or GPU, versions and date, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {versions}, {date.today()}"
    return f"{_processor()}, {os.cpu_count()} logical CPUs, {versions}, {date.today()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
