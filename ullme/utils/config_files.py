"""Finding ``configs/...yaml`` in the current folder, in this checkout or in the installed package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def configs_folder() -> Path:
    """The folder of this project's own configs: in the checkout, or inside the installed package."""
    package = Path(__file__).parents[1]  # ullme/
    inside, beside = package / "configs", package.parent / "configs"
    return inside if inside.is_dir() else beside


def locate(name: str | Path) -> Path:
    """``name`` itself if there is such a file; else, if it begins with ``configs/``, this project's file of that name.

    A name that is found nowhere is returned as it is; opening it gives the error.
    """
    path = Path(name).expanduser()  # no shell does this in --config=~/file
    if (
        not path.exists()
        and path.parts[:1] == ("configs",)
        and (own := configs_folder().joinpath(*path.parts[1:])).is_file()
    ):
        return own
    return path


def locate_in_arguments(argv: Sequence[str]) -> list[str]:
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
