"""Peak throughput and memory of accelerators, and the free memory of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ullme.utils.precision import cpu_rates

# Vendors' peak for dense bfloat16 products with float32 accumulation, in TFLOP/s, by the words in a device's name; the
# first entry that matches is used.
_PEAK_TFLOPS: list[tuple[tuple[str, ...], float]] = [
    (("b200",), 2250),
    (("gb200",), 2500),
    (("h100", "pcie"), 756),
    (("h100", "nvl"), 835),
    (("h100",), 989),
    (("h200",), 989),
    (("h800",), 989),
    (("gh200",), 989),
    (("a100",), 312),
    (("a800",), 312),
    (("l40s",), 362),
    (("l40",), 181),
    (("l4",), 121),
    (("a40",), 150),
    (("a30",), 165),
    (("a10",), 125),
    (("a10g",), 70),
    (("a6000",), 155),
    (("5090",), 210),
    (("4090",), 165),
    (("3090",), 71),
    (("mi300x",), 1307),
]


def peak_tflops(device_name: str) -> float | None:
    """Peak dense bfloat16 TFLOP/s of a device by its name, such as "NVIDIA A100-SXM4-80GB"; None if unknown."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    return next((peak for name_words, peak in _PEAK_TFLOPS if words.issuperset(name_words)), None)


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Args:
        name: for display.
        tflops: peak dense TFLOP/s, in bfloat16; of a CPU as measured, in the dtype that it computes in.
        memory_gib: GiB that a process can use.
        kind: ``cuda`` or ``cpu``.
        bandwidth: of its memory in GB/s, as vendors give it; None where it is not known.
    """

    name: str
    tflops: float
    memory_gib: float
    kind: str = "cuda"
    bandwidth: float | None = None


DEVICES = {
    "a100-40gb": Device("A100-40GB", 312, 39.5, bandwidth=1555),
    "a100-80gb": Device("A100-80GB", 312, 79.2, bandwidth=2039),
    "h100": Device("H100", 989, 79.2, bandwidth=3350),
    "h200": Device("H200", 989, 139.8, bandwidth=4800),
    "b200": Device("B200", 2250, 178, bandwidth=8000),
    "l40s": Device("L40S", 362, 44.5, bandwidth=864),
    "l4": Device("L4", 121, 22.0, bandwidth=300),
    "a10g": Device("A10G", 70, 22.0, bandwidth=600),
    "a6000": Device("RTX A6000", 155, 47.4, bandwidth=768),
    "rtx-4090": Device("RTX 4090", 165, 23.5, bandwidth=1008),
    "rtx-3090": Device("RTX 3090", 71, 23.5, bandwidth=936),
}


def this_cpu(bfloat16: bool) -> Device:
    """This machine's CPU with as many cores as torch has threads: its measured speed and its free memory."""
    threads, rates = torch.get_num_threads(), cpu_rates()
    rate = rates.bfloat16 if bfloat16 else rates.float32
    name = f"CPU ({rate:.3g} GFLOP/s a core in {'bfloat16' if bfloat16 else 'float32'}, {threads} threads)"
    return Device(name, threads * rate / 1000, free_memory(torch.device("cpu")) / 2**30, "cpu")


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still allocate, including what its own CUDA allocator has reserved but not used."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return min([psutil.virtual_memory().available, *_container_memory()])


def _container_memory() -> list[float]:
    """The free bytes under a container's limit (cgroup v2), as a list of one; empty without a limit."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return [] if limit == "max" else [float(limit) - float(used)]
    except (OSError, ValueError):
        return []


def number_of(devices: Any) -> int | str:
    """The number of devices in ``trainer.devices`` (a number, a list, or text such as "0,2"); "auto" for all."""
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    if isinstance(devices, list):
        return len(devices)
    return "auto" if str(devices) in ("auto", "-1") else int(devices)
