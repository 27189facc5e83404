"""Checks of the machine and the installation: versions, devices, precision, disk, logins."""

from __future__ import annotations

import netrc
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ullme.commands.doctor.checks import CheckFailed, NotChecked

# Libraries whose versions are always shown.
_SHOWN = ("torch", "transformers", "peft", "lightning", "mteb", "datasets")
GIB = 2**30


def versions() -> str:
    """Python and the libraries against what the package asks for. Raises: CheckFailed: one is missing or too old."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, wanted = _metadata()
    found = ".".join(map(str, sys.version_info[:3]))
    if found not in SpecifierSet(python):
        raise CheckFailed(f"python {found}, but {python} is needed", "make a virtual environment with a newer Python")
    installed, bad = {}, []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed[requirement.name] = version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            bad.append((requirement, "is missing"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            bad.append((requirement, f"is {version}"))
    if bad:
        problems = ", ".join(f"{one.name} {problem}, {one.specifier} is needed" for one, problem in bad)
        raise CheckFailed(problems, f"pip install -U {' '.join(repr(str(one)) for one, _ in bad)}")
    shown = ", ".join(f"{name} {installed[name]}" for name in _SHOWN if name in installed)
    return f"python {found}, {shown}; all {len(installed)} libraries are new enough"


def _metadata() -> tuple[str, list[str]]:
    """The required Python and libraries, from the checkout's pyproject.toml or the installed package's metadata."""
    checkout = Path(__file__).parents[3] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    try:
        found = metadata.metadata("ullme")
    except metadata.PackageNotFoundError:
        raise NotChecked("ullme is not installed as a package, so its requirements are not known") from None
    return found["Requires-Python"], metadata.requires("ullme") or []


def devices(accelerator: str = "auto", count: str = "auto") -> str:
    """The GPUs and their driver, and a matrix product on each GPU.

    Args:
        accelerator: trainer.accelerator.
        count: trainer.devices.

    Raises:
        CheckFailed: a GPU that torch cannot use, one that computes wrongly, or fewer than the configuration asks for.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wants_gpu = accelerator in ("gpu", "cuda")
    if not gpus:
        _check_driver(torch.version.cuda)
        if wants_gpu:
            raise CheckFailed(
                f"trainer.accelerator={accelerator}, but there is no GPU here",
                "--config configs/strategy/cpu.yaml, or run where a GPU is",
            )
        if accelerator == "auto" and torch.backends.mps.is_available():
            raise CheckFailed(
                "trainer.accelerator=auto takes an Apple GPU, which is not supported",
                "--config configs/strategy/cpu.yaml",
            )
        return f"no GPU; {os.cpu_count()} CPU cores, of which torch uses {torch.get_num_threads()}"
    if accelerator != "cpu" and count.isdigit() and int(count) > gpus:
        raise CheckFailed(f"trainer.devices={count}, but there are {gpus} GPUs", f"--trainer.devices={gpus}")
    names = [torch.cuda.get_device_name(n) for n in range(gpus)]
    sizes = [torch.cuda.get_device_properties(n).total_memory / GIB for n in range(gpus)]
    for n in range(gpus):
        _check_product(torch.device("cuda", n))
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    listed = ", ".join(f"{name} ({size:.0f} GiB)" for name, size in zip(names, sizes, strict=True))
    half = "" if torch.cuda.is_bf16_supported() else "; no bfloat16: choose trainer.precision=32-true"
    return (
        f"{listed}; torch for CUDA {torch.version.cuda}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}{half}"
    )


def precision(accelerator: str = "auto", chosen: Mapping[str, Any] | None = None) -> str:
    """How fast the CPU is in bfloat16 and in float32, and what ``auto`` makes of it.

    Args:
        accelerator: trainer.accelerator.
        chosen: options of a configuration that say a precision or a dtype, with ``auto`` replaced.

    Raises:
        NotChecked: the run is on a GPU.
        CheckFailed: one of ``chosen`` is many times slower than float32.
    """
    from ullme.utils.precision import cpu_rates, device_type, slow_choice

    if (device := device_type(accelerator)) != "cpu":
        raise NotChecked("bfloat16 on the GPU; the CPU's speed does not matter")
    for option, value in (chosen or {}).items():
        if found := slow_choice(option, value, device):
            raise CheckFailed(found, f"--{option}={'32-true' if option == 'trainer.precision' else 'float32'}")
    rates = cpu_rates()
    taken = "bf16-mixed and bfloat16" if rates.bfloat16_pays else "32-true and float32"
    return f"this CPU does {rates}; auto takes {taken}"


def _check_driver(built_for: str | None) -> None:
    """Raises: CheckFailed: there is a GPU's driver, and torch cannot use it."""
    driver = Path("/proc/driver/nvidia/version")
    if not driver.is_file() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    if built_for is None:
        raise CheckFailed(
            "there is a GPU's driver, but this torch was built for the CPU", "install torch built for CUDA"
        )
    first = driver.read_text().splitlines()[0]
    raise CheckFailed(
        f"torch for CUDA {built_for} finds no GPU, but there is a driver ({first})",
        "update the driver, or install torch built for an older CUDA (https://pytorch.org/get-started/locally)",
    )


def _check_product(device: object) -> None:
    """Raises: CheckFailed: a small matrix product in bfloat16 is far from the CPU's."""
    import torch

    a = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    found = (a.to(device).bfloat16() @ a.T.to(device).bfloat16()).float().cpu()  # type: ignore[call-overload]
    if not torch.allclose(found, a @ a.T, atol=0.3, rtol=0.02):
        raise CheckFailed(f"{device} computes a matrix product wrongly", "run nvidia-smi, and take another GPU")


def free_disk(folder: Path, needed: float, what: str) -> str:
    """Whether there is enough free disk space.

    Args:
        folder: to write to; it need not exist yet.
        needed: bytes.
        what: is written, for the message.

    Raises:
        CheckFailed: there is less.
    """
    free = shutil.disk_usage(existing(folder)).free
    space = f"{free / GIB:.1f} GiB free in {existing(folder)}, {what} {'take' if needed else 'are'} {_size(needed)}"
    if free < needed:
        raise CheckFailed(space, "free space, or name another folder with --trainer.default_root_dir")
    return space


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count > 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def hub_login() -> str:
    """Whether there is a token for the Hugging Face hub; the hub is not asked. Raises: NotChecked: there is none."""
    from huggingface_hub import constants, get_token

    offline = "; HF_HUB_OFFLINE is set, so only the cache is used" if constants.HF_HUB_OFFLINE else ""
    if get_token() is None:
        raise NotChecked(f"no token: only public models and data (hf auth login){offline}")
    return f"logged in with a token{offline}"


def wandb_login(used: bool) -> str:
    """Whether there are credentials for W&B; its server is not asked.

    Args:
        used: whether the run logs there.

    Raises:
        CheckFailed: the run would stop to ask for a key.
        NotChecked: there are none, and no run here needs them.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={mode}: no login needed"
    if os.environ.get("WANDB_API_KEY"):
        return "logged in (WANDB_API_KEY)"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if _in_netrc(host):
        return f"logged in ({host} in the netrc file)"
    if not used:
        raise NotChecked("not logged in; no run here logs to W&B")
    raise CheckFailed(
        f"not logged in to {host}, and trainer.logger is W&B",
        "wandb login; or WANDB_MODE=offline (wandb sync sends it later); or --trainer.logger=CSVLogger",
    )


def _in_netrc(host: str) -> bool:
    files = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in (Path(f) for f in files if f):
        try:
            if file.is_file() and host in netrc.netrc(file).hosts:
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False
