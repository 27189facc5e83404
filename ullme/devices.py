"""What accelerators can do at most."""

from __future__ import annotations

import re

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
