"""``~/`` at the beginning of a value, which a shell expands neither in a YAML file nor in ``--option=~/folder``."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

# Options that hold words, which may begin with ``~/`` themselves.
_WORDS = ("text", "prompts", "query_prompt", "passage_prompt", "instruction", "instructions", "title")


def expand_home(options: Namespace) -> None:
    """Replace ``~/`` at the beginning of every value by the home folder, in place.

    Without this a run would write into a folder called ``~``.

    Args:
        options: as argparse or jsonargparse has parsed them, lists and mappings in them included.
    """
    for name, value in vars(options).items():
        if name not in _WORDS:
            vars(options)[name] = _expanded(value)


def _expanded(value: Any) -> Any:
    if isinstance(value, Namespace):
        expand_home(value)
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if isinstance(value, Path):
        return value.expanduser()
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    if isinstance(value, dict):
        return {name: one if name in _WORDS else _expanded(one) for name, one in value.items()}
    return value
