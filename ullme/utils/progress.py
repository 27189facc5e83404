"""Progress bars of work that is mostly quick, and sometimes takes minutes."""

from __future__ import annotations

import sys
from typing import Any

from ullme.distributed import world

# Seconds before a bar shows.
DELAY = 2.0


def progress(desc: str, *args: Any, **kwargs: Any) -> Any:
    """tqdm's bar on stderr, on the first rank only, once the work has taken :data:`DELAY` seconds; gone at the end.

    Where stderr is no terminal it writes a line every half a minute. TQDM_DISABLE=1 switches it off.

    Args:
        desc: what is done.
        *args: tqdm's own: what to iterate over.
        **kwargs: likewise: total, unit ...
    """
    from tqdm.auto import tqdm

    every = 0.2 if sys.stderr.isatty() else 30.0
    off = {"disable": True} if world()[0] > 0 else {}  # left out, TQDM_DISABLE decides
    return tqdm(*args, desc=desc, delay=DELAY, leave=False, mininterval=every, **off, **kwargs)
