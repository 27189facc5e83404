"""What holds of the machine and the installation, whatever is trained: versions, devices, disk, logins."""

from __future__ import annotations

import netrc
import os
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse

from ullme.commands.doctor.checks import NotChecked, Trouble

# Named in the table even where they are in order.
_SHOWN = ("torch", "transformers", "peft", "lightning", "mteb", "datasets")
GIB = 2**30


def versions() -> str:
    """Python and the libraries against what the package asks for. Raises: Trouble: one is missing or too old."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, wanted = _metadata()
    found = ".".join(map(str, sys.version_info[:3]))
    if found not in SpecifierSet(python):
        raise Trouble(f"python {found}, but {python} is needed", "make a virtual environment with a newer Python")
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
        said = ", ".join(f"{one.name} {problem}, {one.specifier} is needed" for one, problem in bad)
        raise Trouble(said, f"pip install -U {' '.join(repr(str(one)) for one, _ in bad)}")
    shown = ", ".join(f"{name} {installed[name]}" for name in _SHOWN if name in installed)
    return f"python {found}, {shown}; all {len(installed)} libraries are new enough"


def _metadata() -> tuple[str, list[str]]:
    """What Python and which libraries the package asks for: as installed, or as its checkout says."""
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    try:
        found = metadata.metadata("ullme")
    except metadata.PackageNotFoundError:
        raise NotChecked("ullme is not installed as a package, so nothing says what it needs") from None
    return found["Requires-Python"], metadata.requires("ullme") or []


def devices(accelerator: str = "auto", count: str = "auto") -> str:
    """GPUs, their driver, and that they compute.

    Args:
        accelerator: trainer.accelerator.
        count: trainer.devices.

    Raises:
        Trouble: a GPU that torch cannot use, one that computes wrongly, or fewer than the configuration asks for.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wants_gpu = accelerator in ("gpu", "cuda")
    if not gpus:
        _check_driver(torch.version.cuda)
        if wants_gpu:
            raise Trouble(
                f"trainer.accelerator={accelerator}, but there is no GPU here",
                "--config configs/strategy/cpu.yaml, or run where a GPU is",
            )
        if accelerator == "auto" and torch.backends.mps.is_available():
            raise Trouble(
                "trainer.accelerator=auto takes an Apple GPU, which is not supported",
                "--config configs/strategy/cpu.yaml",
            )
        return f"no GPU; {os.cpu_count()} CPU cores, of which torch uses {torch.get_num_threads()}"
    if accelerator != "cpu" and count.isdigit() and int(count) > gpus:
        raise Trouble(f"trainer.devices={count}, but there are {gpus} GPUs", f"--trainer.devices={gpus}")
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


def _check_driver(built_for: str | None) -> None:
    """Raises: Trouble: there is a GPU's driver, and torch cannot use it."""
    driver = Path("/proc/driver/nvidia/version")
    if not driver.is_file() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    if built_for is None:
        raise Trouble("there is a GPU's driver, but this torch was built for the CPU", "install torch built for CUDA")
    first = driver.read_text().splitlines()[0]
    raise Trouble(
        f"torch for CUDA {built_for} finds no GPU, but there is a driver ({first})",
        "update the driver, or install torch built for an older CUDA (https://pytorch.org/get-started/locally)",
    )


def _check_product(device: object) -> None:
    """Raises: Trouble: a small matrix product in bfloat16 is far from the CPU's."""
    import torch

    a = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    found = (a.to(device).bfloat16() @ a.T.to(device).bfloat16()).float().cpu()  # type: ignore[call-overload]
    if not torch.allclose(found, a @ a.T, atol=0.3, rtol=0.02):
        raise Trouble(f"{device} computes a matrix product wrongly", "run nvidia-smi, and take another GPU")


def free_disk(folder: Path, needed: float, what: str) -> str:
    """Room for what a run writes.

    Args:
        folder: where; it need not be there yet.
        needed: bytes.
        what: is written.

    Raises:
        Trouble: there is less.
    """
    free = shutil.disk_usage(existing(folder)).free
    said = f"{free / GIB:.1f} GiB free in {existing(folder)}, {what} {'take' if needed else 'are'} {_size(needed)}"
    if free < needed:
        raise Trouble(said, "make room, or name another folder with --trainer.default_root_dir")
    return said


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count > 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def hub_login() -> str:
    """Whether the hub knows this user, without asking it. Raises: NotChecked: there is no token."""
    from huggingface_hub import constants, get_token

    offline = "; HF_HUB_OFFLINE is set, so only what is in the cache can be had" if constants.HF_HUB_OFFLINE else ""
    if get_token() is None:
        raise NotChecked(f"no token: only public models and data (hf auth login){offline}")
    return f"a token is there{offline}"


def wandb_login(used: bool) -> str:
    """Whether W&B knows this user, without asking it.

    Args:
        used: whether the run logs there.

    Raises:
        Trouble: the run would stop to ask for a key.
        NotChecked: nobody is logged in, and nobody needs to be.
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
    raise Trouble(
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
