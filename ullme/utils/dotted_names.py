"""Importing a user's own objects by dotted path."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any


def add_cwd_to_path() -> None:
    """Let Python import modules from the current folder, after every other place."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def named(path: str, option: str) -> Any:
    """Import the object of a dotted path such as ``my_file.my_function``; a path without a dot is a module.

    Args:
        path: as in ``class_path``.
        option: that holds the path, for the message.

    Raises:
        ValueError: it cannot be imported.
    """
    add_cwd_to_path()
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name) if module else import_module(name)
    except Exception as error:  # whatever the user's file does when it is imported
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"{option}={path!r} cannot be imported ({type(error).__name__}: {reason}); give module.name of a file in "
            "the current folder, on PYTHONPATH or in an installed package"
        ) from error
