"""Progress bars for work that is usually quick but may take minutes."""

from __future__ import annotations

import sys
from typing import Any

from ullme.distributed import world

# Seconds before a bar shows.
DELAY = 2.0


def progress(desc: str, *args: Any, **kwargs: Any) -> Any:
    """A tqdm bar on stderr, on the first rank only, shown after :data:`DELAY` seconds and removed at the end.

    Where stderr is not a terminal it writes a line every 30 seconds. TQDM_DISABLE=1 switches it off.

    Args:
        desc: label of the bar.
        *args: tqdm's own, such as the iterable.
        **kwargs: tqdm's own, such as total and unit.
    """
    from tqdm.auto import tqdm

    every = 0.2 if sys.stderr.isatty() else 30.0
    off = {"disable": True} if world()[0] > 0 else {}  # without this key TQDM_DISABLE decides
    return tqdm(*args, desc=desc, delay=DELAY, leave=False, mininterval=every, **off, **kwargs)
