"""Where ``configs/...yaml`` is: in the current folder, in this checkout, or in the installed package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def shipped() -> Path:
    """The folder of this project's configs: of the checkout that is imported, or inside the installed package."""
    package = Path(__file__).parent
    inside, beside = package / "configs", package.parent / "configs"
    return inside if inside.is_dir() else beside


def locate(name: str | Path) -> Path:
    """``name`` as it is if there is such a file; else, if it begins with ``configs/``, the shipped file of that name.

    A file that is nowhere comes back as it was, for whoever opens it to complain.
    """
    path = Path(name)
    if not path.exists() and path.parts[:1] == ("configs",) and (own := shipped().joinpath(*path.parts[1:])).is_file():
        return own
    return path


def located(argv: Sequence[str]) -> list[str]:
    """Arguments with every ``--config configs/...`` located, so that an installed package needs no checkout."""
    found = []
    for before, argument in zip(["", *argv], argv, strict=False):
        if before == "--config":
            found.append(str(locate(argument)))
        elif argument.startswith("--config="):
            found.append(f"--config={locate(argument.removeprefix('--config='))}")
        else:
            found.append(argument)
    return found
