"""``ullme cache``: the indices of checked training rows on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime


def parser() -> argparse.ArgumentParser:
    """The options."""
    from ullme.data.row_cache import CACHE_VARIABLE, LIMIT_VARIABLE

    options = argparse.ArgumentParser(
        prog="ullme cache",
        description="Indices of checked training rows, and unpacked .jsonl.gz and .jsonl.zst files. "
        f"${CACHE_VARIABLE} sets the folder, ${LIMIT_VARIABLE} the size in GB above which unused entries are removed.",
    )
    options.add_argument("--cache_dir", help=f"as data.cache_dir (default: ${CACHE_VARIABLE} or ~/.cache/ullme)")
    options.add_argument("--clear", action="store_true", help="remove all entries but those in use")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """List the entries of the cache, or remove them.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0; 2 for a mistake in the arguments or a folder that cannot be cleared.
    """
    from ullme.data.row_cache import cache_root, clear, entries, size_limit
    from ullme.utils.expanded_paths import expand_paths

    options = parser().parse_args(argv)
    try:
        expand_paths(options)
        root = cache_root(options.cache_dir)
        if options.clear:
            freed, kept = clear(root)
            in_use = f"; {kept} in use by a run stay" if kept else ""
            print(f"{freed / 1e9:.3f} GB removed from {root}{in_use}")
            return 0
        found = entries(root)
        for folder, size, used in found:
            print(f"{folder.name}  {size / 1e9:9.3f} GB  last used {datetime.fromtimestamp(used):%Y-%m-%d %H:%M}")
        total = sum(size for _, size, _ in found)
        print(f"{root}: {len(found)} entries, {total / 1e9:.3f} of at most {size_limit() / 1e9:g} GB")
    except (OSError, ValueError) as error:
        print(f"cache: error: {error}", file=sys.stderr)
        return 2
    return 0
