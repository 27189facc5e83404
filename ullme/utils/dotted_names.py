"""Objects of a user's own files, by the dotted path under which Python imports them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any


def look_here() -> None:
    """Let imports find files of the folder in which the command was started, after everything else."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def named(path: str, option: str) -> Any:
    """What a dotted path such as ``my_file.my_function`` names; the module alone where there is no dot.

    Args:
        path: as in ``class_path``.
        option: what it was given for, for the message.

    Raises:
        ValueError: it cannot be imported.
    """
    look_here()
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name) if module else import_module(name)
    except Exception as error:  # whatever the user's file does when it is imported
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"{option}={path!r} cannot be imported ({type(error).__name__}: {reason}); give module.name of a file in "
            "the current folder, on PYTHONPATH or in an installed package"
        ) from error
