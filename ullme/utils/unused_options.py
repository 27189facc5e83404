"""Options that were given and that the rest of a command line makes useless."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser


def warn_of_unused(parser: ArgumentParser, options: Any, unused: Mapping[str, Sequence[str]]) -> None:
    """Print a line on stderr for each option that has another value than its default and that nothing will read.

    Args:
        parser: of the options.
        options: as parsed.
        unused: why ("with --method dense") -> names of options that are not used then.
    """
    usual = parser.get_defaults()
    command = (parser.prog or "").split()[-1]
    for why, names in unused.items():
        for name in names:
            if options[name] != usual[name]:
                print(f"{command}: --{name} {_shown(options[name])} is not used {why}", file=sys.stderr)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
