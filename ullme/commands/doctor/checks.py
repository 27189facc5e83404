"""A check, what became of it, and the table of them."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from ullme.utils.errors import one_line

_MARKS = {True: "✓", False: "✗", None: "–"}
_PLAIN_MARKS = {True: "ok", False: "NO", None: "--"}
_NAME = 18


@dataclass(frozen=True)
class Check:
    """What became of one check.

    Args:
        name: of what was looked at.
        passed: None where it could not be looked at, or need not be.
        found: what was seen.
        remedy: what to do, where it did not pass.
    """

    name: str
    passed: bool | None
    found: str
    remedy: str = ""


class Trouble(Exception):
    """Something is wrong.

    Args:
        found: what.
        remedy: what to do about it.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found, self.remedy = found, remedy


class NotChecked(Exception):
    """There is nothing to look at here; the text says why."""


def examine(name: str, look: Callable[[], str]) -> Check:
    """Look at one thing.

    Args:
        name: of it.
        look: returns what was found in order; raises Trouble, NotChecked, or ValueError as the rest of ULLME does,
            with the remedy behind the last semicolon.
    """
    try:
        return Check(name, True, look())
    except NotChecked as reason:
        return Check(name, None, str(reason))
    except Trouble as trouble:
        return Check(name, False, trouble.found, trouble.remedy)
    except ValueError as error:
        found, _, remedy = one_line(error).rpartition("; ")
        return Check(name, False, found or remedy, remedy if found else "mend what the message names")
    except Exception as error:  # a check that falls over is a finding too, not the end of the others
        if os.environ.get("ULLME_TRACEBACK"):
            raise
        return Check(name, False, f"{type(error).__name__}: {one_line(error)[:300]}", "ULLME_TRACEBACK=1 shows where")


def line(check: Check, encoding: str | None = "utf-8") -> str:
    """A check as the table has it, wrapped to the terminal.

    Args:
        check: what to print.
        encoding: of where it is printed; where ✓ cannot be, words are.
    """
    width = max(60, shutil.get_terminal_size((120, 24)).columns)
    mark = _marks(encoding)[check.passed]
    margin = " " * (len(mark) + _NAME + 3)
    found = textwrap.wrap(check.found, width - len(margin)) or [""]
    lines = [f"{mark}  {check.name:<{_NAME}} {found[0]}", *(margin + more for more in found[1:])]
    if check.passed is False:
        indent = " " * len("to do: ")
        lines += textwrap.wrap(
            f"to do: {check.remedy}", width, initial_indent=margin, subsequent_indent=margin + indent
        )
    return "\n".join(lines)


def summary(checks: list[Check], seconds: float, encoding: str | None = "utf-8") -> str:
    """How many of each kind."""
    marks = _marks(encoding)
    counts = ", ".join(f"{sum(c.passed is kind for c in checks)} {mark}" for kind, mark in marks.items())
    return f"{counts} in {seconds:.0f} s"


def _marks(encoding: str | None) -> dict[bool | None, str]:
    try:
        "".join(_MARKS.values()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_MARKS
    return _MARKS
