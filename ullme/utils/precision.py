"""bfloat16 or float32 on a CPU: the one place that decides, by what the processor can.

With AVX512-BF16 or AMX a CPU multiplies bfloat16 faster than float32; without them up to a hundred times slower. So
``auto`` measures both, once per process and in about 0.1 s. On a GPU nothing is measured, and ``auto`` is
bfloat16.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Replaces the measurement, such as "float32=72,bfloat16=0.7". It is set after a measurement: child processes inherit
# it, so that the ranks that Lightning starts decide as the first one.
RATES_VARIABLE = "ULLME_CPU_GFLOPS"
# An explicit choice is warned of if it is so many times slower than float32.
SLOW = 5.0
_HALF = ("bfloat16", "float16")
# The product of a (64, 512) with a (512, 512) matrix is large enough for the kernels that training uses.
_ROWS, _WIDTH, _REPEATS = 64, 512, 5
# Seconds after which a product is not repeated: it is slow, and no repetition changes that.
_ENOUGH = 0.01


def autocast_is_needless(llm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all weights of an LLM, adapters aside, have autocast's dtype already, so it runs without autocast."""
    return {p.dtype for name, p in llm.named_parameters() if ".lora_" not in name} == {dtype}


@dataclass(frozen=True)
class CpuRates:
    """Speed of one core in matrix products, in GFLOP/s."""

    float32: float
    bfloat16: float

    @property
    def bfloat16_pays(self) -> bool:
        """Whether bfloat16 is faster than float32."""
        return self.bfloat16 > self.float32

    @property
    def slowdown(self) -> float:
        """How many times slower bfloat16 is than float32; below 1 where it is faster."""
        return self.float32 / self.bfloat16

    def __str__(self) -> str:
        return f"float32 {self.float32:.3g} and bfloat16 {self.bfloat16:.3g} GFLOP/s a core"


@dataclass(frozen=True)
class TrainingPrecision:
    """The precision of a training run, with ``auto`` replaced.

    Args:
        precision: of the trainer.
        dtype: of the LLM's weights.
        reason: what was taken and why; None where nothing was replaced.
    """

    precision: str | int | None
    dtype: str
    reason: str | None = None


@lru_cache(maxsize=1)
def cpu_rates() -> CpuRates:
    """The rates of this machine's processor, or those in ULLME_CPU_GFLOPS; under torchrun those of the first rank.

    Raises:
        ValueError: ULLME_CPU_GFLOPS cannot be read.
    """
    text = os.environ.get(RATES_VARIABLE) or _agreed_rates()
    os.environ[RATES_VARIABLE] = text
    try:
        pairs = dict(part.split("=") for part in text.split(","))
        rates = CpuRates(float(pairs["float32"]), float(pairs["bfloat16"]))
        if not min(rates.float32, rates.bfloat16) > 0:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(
            f"{RATES_VARIABLE}={text!r}: write both rates in GFLOP/s, such as float32=72,bfloat16=0.7, or unset it"
        ) from None
    return rates


def _agreed_rates() -> str:
    """Measure the rates; the ranks of torchrun take those that the first rank measured."""
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(environment.get("WORLD_SIZE", "1")) < 2:
        return _measured_rates()
    from torch.distributed import TCPStore

    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    key = f"ullme/{RATES_VARIABLE}/{environment.get('TORCHELASTIC_RUN_ID')}"
    if environment.get("RANK") == "0":
        store.set(key, _measured_rates())
    return store.get(key).decode()


def _measured_rates() -> str:
    """One thread, the best of a few: neither depends on what else the machine is doing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ",".join(f"{name}={_gflops(getattr(torch, name)):.3g}" for name in ("float32", "bfloat16"))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _gflops(dtype: torch.dtype) -> float:
    a, b = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    a[:1] @ b  # the first product of a process also pays for setting up
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
        if best > _ENOUGH:
            break
    return 2 * _ROWS * _WIDTH * _WIDTH / best / 1e9


def device_type(accelerator: str) -> str:
    """Where a trainer with this ``accelerator`` computes: "cpu", or "cuda" for any other device."""
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if accelerator == "cpu" else "cuda"


def choose_precision(
    precision: str | int | None, dtype: str, device: str, stored_dtype: Callable[[], str | None]
) -> TrainingPrecision:
    """Replace ``auto`` in ``trainer.precision`` and ``model.backbone.dtype``.

    With ``precision: auto`` both are bfloat16 (bf16-mixed) on a GPU and where the CPU is faster with it, else float32
    (32-true). With any other precision ``dtype: auto`` keeps its meaning, see :func:`loading_dtype`.

    Args:
        precision: Lightning's, or auto.
        dtype: of the weights, or auto.
        device: "cpu" or "cuda".
        stored_dtype: returns the dtype in which the LLM is stored, or None; asked only where it matters.
    """
    if precision == "auto":
        half = device != "cpu" or cpu_rates().bfloat16_pays
        chosen = TrainingPrecision("bf16-mixed" if half else "32-true", dtype)
        if dtype == "auto":
            chosen = TrainingPrecision(chosen.precision, "bfloat16" if half else "float32")
    elif dtype == "auto" and device == "cpu":
        chosen = TrainingPrecision(precision, loading_dtype("auto", stored_dtype(), device))
    else:
        return TrainingPrecision(precision, dtype)
    if (chosen.precision, chosen.dtype) == (precision, dtype):
        return chosen
    where = f"this CPU does {cpu_rates()}" if device == "cpu" else "on a GPU"
    taken = f"trainer.precision={chosen.precision}, model.backbone.dtype={chosen.dtype}"
    return TrainingPrecision(chosen.precision, chosen.dtype, f"{taken} ({where})")


def loading_dtype(dtype: str, stored: str | None, device: str) -> str:
    """The dtype in which to load weights: an explicit one as it is; ``auto`` as they are stored, but in float32 where
    they are stored in half precision and a CPU would compute slowly with it. (float16 is slow on nearly every CPU.)

    Args:
        dtype: asked for, or auto.
        stored: the dtype of the weights on the disk; None where it is not known.
        device: "cpu" or "cuda".
    """
    if dtype != "auto" or device != "cpu" or stored not in _HALF:
        return dtype
    return "auto" if stored == "bfloat16" and cpu_rates().bfloat16_pays else "float32"


def stored_dtype(model: str, download: bool = False) -> str | None:
    """The dtype in which an LLM is stored, such as "bfloat16"; None where it is not known.

    Args:
        model: hub name or folder.
        download: config.json from the hub, where it is not on this machine.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    file: Any = Path(model, "config.json")
    try:
        if not Path(model).is_dir():
            file = try_to_load_from_cache(model, "config.json")
            if not isinstance(file, str) and download:
                file = hf_hub_download(model, "config.json")
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        found = [one.get(key) for one in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype")]
    except Exception:  # no such model, no network, no JSON: loading the LLM gives the error
        return None
    return next((str(dtype) for dtype in found if dtype), None)


def slow_choice(option: str, value: str | int | None, device: str) -> str | None:
    """The warning about an explicit choice of half precision on a CPU that is slow with it; None if it is not slow.

    Args:
        option: its name.
        value: as given: a dtype, or Lightning's precision.
        device: "cpu" or "cuda".
    """
    if device != "cpu" or not str(value).startswith(("bf16", *_HALF)):
        return None
    if (rates := cpu_rates()).slowdown < SLOW:
        return None
    return f"{option}={value} is {rates.slowdown:.0f} times slower than float32 on this CPU ({rates}); auto avoids that"
