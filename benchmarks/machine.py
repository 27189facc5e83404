"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import re
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
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {vectors}, {os.cpu_count()} logical CPUs, {versions}, {date.today()}"


def machine_key() -> str:
    """Processor and widest vector instructions that torch uses, as part of a file name: such results are comparable."""
    return re.sub(r"[^a-z0-9]+", "-", f"{_processor()} {torch.backends.cpu.get_cpu_capability()}".lower()).strip("-")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
