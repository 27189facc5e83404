"""The way into training: an answer to ``--help`` comes from a file, anything else starts :mod:`ullme.commands.train`.

Lightning alone takes several seconds to import (with it come torchmetrics, transformers and torch._dynamo), and the
text of ``fit --help`` changes only with the code it describes. So it is made once from the real parser and kept in the
user's cache folder, under a key over everything it is made from.

While modules are imported, Python's cycle collector rests: it would look through hundreds of thousands of new objects
again and again and find next to nothing, for a fifth of the time.
"""

from __future__ import annotations

import gc
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path

from ullme.utils.dotted_names import look_here

# What the text is made from, besides this package.
_LIBRARIES = ("lightning", "torch", "torchmetrics", "jsonargparse")
_QUESTIONS = (["--help"], ["-h"], ["fit", "--help"], ["fit", "-h"], ["validate", "--help"], ["validate", "-h"])


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the command line; see :func:`ullme.commands.train.main`."""
    look_here()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments not in _QUESTIONS:
        with imports():
            from ullme.commands.train import main as train
        return train(argv)
    place, key = _place(arguments), _key(arguments)
    text = _cached(place, key)
    if text is None:
        text = _ask(argv)
        with suppress(OSError):  # no cache folder: it takes as long again the next time
            place.parent.mkdir(parents=True, exist_ok=True)
            own = place.with_name(f"{place.name}.{os.getpid()}")  # another process may write it too
            own.write_text(f"{key}\n{text}")
            own.replace(place)
    sys.stdout.write(text)
    raise SystemExit(0)


@contextmanager
def imports() -> Iterator[None]:
    """For importing much: no cycle is collected meanwhile, and what is there afterwards is not searched for any."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def _place(arguments: list[str]) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "ullme", f"help-{'-'.join(a.strip('-') for a in arguments)}.txt")


def _key(arguments: list[str]) -> str:
    """Of the question, the terminal's width, and the code that answers."""
    package = Path(__file__).parent
    sources = [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(package.rglob("*.py"))]
    asked = (Path(sys.argv[0]).name, arguments, shutil.get_terminal_size().columns, sys.version)
    libraries = [(name, version(name)) for name in _LIBRARIES]
    return hashlib.sha256(repr((asked, libraries, sources)).encode()).hexdigest()


def _cached(place: Path, key: str) -> str | None:
    try:
        found, text = place.read_text().split("\n", 1)
    except (OSError, ValueError):
        return None
    return text if found == key else None


def _ask(argv: Sequence[str] | None) -> str:
    """What the real parser prints. Raises: SystemExit: it ended with an error."""
    with imports():
        from ullme.commands.train import main as train
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            train(argv)
    except SystemExit as end:
        if end.code:
            raise
    return out.getvalue()
