"""``~/`` and ``$VARIABLE/`` at the beginning of a value, which a shell does not expand in a YAML file, nor the first
in ``--option=~/folder``."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

# Options that hold words, which may begin like a path themselves.
_WORDS = ("text", "prompts", "query_prompt", "passage_prompt", "instruction", "instructions", "title")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})(?=/|$)")


def expand_paths(options: Namespace) -> None:
    """Replace ``~/`` and ``$VARIABLE/`` at the beginning of every value by the folder that is meant, in place.

    Without this a run would write into a folder called ``~`` or ``$SCRATCH``.

    Args:
        options: as argparse or jsonargparse has parsed them, lists and mappings in them included.

    Raises:
        ValueError: a variable is not set.
    """
    for name, value in vars(options).items():
        if name not in _WORDS:
            vars(options)[name] = _expanded(value)


def _expanded(value: Any) -> Any:
    if isinstance(value, Namespace):
        expand_paths(value)
    if isinstance(value, str):
        return _expanded_path(value)
    if isinstance(value, Path):
        return Path(_expanded_path(str(value)))
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    if isinstance(value, dict):
        return {name: one if name in _WORDS else _expanded(one) for name, one in value.items()}
    return value


def _expanded_path(value: str) -> str:
    if value.startswith("~/"):
        return os.path.expanduser(value)
    if found := _VARIABLE.match(value):
        name = found[1] or found[2]
        if name not in os.environ:
            raise ValueError(f"{value!r}: the environment variable {name} is not set; set it, or write the path out")
        return os.environ[name] + value[found.end() :]
    return value
