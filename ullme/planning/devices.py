"""What accelerators can do at most, and hold; what this machine's processor does and holds."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Makers' figures: dense bfloat16 products with float32 sums, in TFLOP/s; the first that fits a name counts.
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
    """Dense bfloat16 TFLOP/s of a device by its name, such as "NVIDIA A100-SXM4-80GB"; None if it is not known."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    return next((peak for needed, peak in _PEAK_TFLOPS if words.issuperset(needed)), None)


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Args:
        name: as a reader knows it.
        tflops: dense TFLOP/s: an accelerator's in bfloat16 as its maker says, a CPU's as measured.
        memory_gib: what a process can have.
        kind: ``cuda`` or ``cpu``.
    """

    name: str
    tflops: float
    memory_gib: float
    kind: str = "cuda"


DEVICES = {
    "a100-40gb": Device("A100-40GB", 312, 39.5),
    "a100-80gb": Device("A100-80GB", 312, 79.2),
    "h100": Device("H100", 989, 79.2),
    "h200": Device("H200", 989, 139.8),
    "b200": Device("B200", 2250, 178),
    "l40s": Device("L40S", 362, 44.5),
    "l4": Device("L4", 121, 22.0),
    "a10g": Device("A10G", 70, 22.0),
    "a6000": Device("RTX A6000", 155, 47.4),
    "rtx-4090": Device("RTX 4090", 165, 23.5),
    "rtx-3090": Device("RTX 3090", 71, 23.5),
}


def this_cpu(dtype: torch.dtype) -> Device:
    """The processor that this process runs on, with as many threads as torch uses: the speed of its products in
    ``dtype`` is measured, which takes a second at most, and its memory is what is free now."""
    threads = torch.get_num_threads()
    return Device(
        f"this CPU, {threads} thread{'s' if threads > 1 else ''}, {str(dtype).removeprefix('torch.')}",
        product_tflops(dtype),
        free_memory(torch.device("cpu")) / 2**30,
        kind="cpu",
    )


def product_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of matrix products in ``dtype`` on the CPU: the fastest of a few, as others may use the machine too."""
    size = 512
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    times, started = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < 0.2:
        begin = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times) / 1e12


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still take: on CUDA what nobody has, and what its own allocator holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return min([psutil.virtual_memory().available, *_container_room()])


def _container_room() -> list[float]:
    """What a container's limit leaves (cgroup version 2); nothing where there is none."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return [] if limit == "max" else [float(limit) - float(used)]
    except (OSError, ValueError):
        return []


def number_of(devices: Any) -> int | str:
    """How many ``trainer.devices`` names: a number, a list, or "0,2"; "auto" for all there are."""
    if isinstance(devices, str) and "," in devices:
        devices = [one for one in devices.split(",") if one.strip()]
    if isinstance(devices, list):
        return len(devices)
    return "auto" if str(devices) in ("auto", "-1") else int(devices)
