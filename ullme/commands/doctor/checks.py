"""Running a check, its result, and how results are printed."""

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
    """The result of one check.

    Args:
        name: of the check.
        passed: None where it does not apply or cannot be made.
        found: what was found.
        remedy: what to do, where the check failed.
    """

    name: str
    passed: bool | None
    found: str
    remedy: str = ""


class CheckFailed(Exception):
    """A check found something wrong.

    Args:
        found: what is wrong.
        remedy: what to do about it.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found, self.remedy = found, remedy


class NotChecked(Exception):
    """A check does not apply or cannot be made; the text says why."""


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run one check and catch what it raises.

    Args:
        name: of the check.
        check: returns what it found where all is well; raises CheckFailed, NotChecked, or a ValueError whose remedy
            follows the last semicolon of its message.
    """
    try:
        return Check(name, True, check())
    except NotChecked as reason:
        return Check(name, None, str(reason))
    except CheckFailed as failure:
        return Check(name, False, failure.found, failure.remedy)
    except ValueError as error:
        found, _, remedy = one_line(error).rpartition("; ")
        return Check(name, False, found or remedy, remedy if found else "fix what the message names")
    except Exception as error:  # an unexpected error fails this check and does not stop the others
        if os.environ.get("ULLME_TRACEBACK"):
            raise
        return Check(name, False, f"{type(error).__name__}: {one_line(error)[:300]}", "ULLME_TRACEBACK=1 shows where")


def format_check(check: Check, encoding: str | None = "utf-8") -> str:
    """A row of the printed table, wrapped to the width of the terminal.

    Args:
        check: the result to print.
        encoding: of the output; an encoding without ✓ gets words instead.
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
    """The last line: how many checks passed, failed and were not made."""
    marks = _marks(encoding)
    counts = ", ".join(f"{sum(c.passed is kind for c in checks)} {mark}" for kind, mark in marks.items())
    return f"{counts} in {seconds:.0f} s"


def _marks(encoding: str | None) -> dict[bool | None, str]:
    try:
        "".join(_MARKS.values()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_MARKS
    return _MARKS
