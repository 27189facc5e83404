"""What tests of the index of checked rows share."""

from __future__ import annotations

import os
from pathlib import Path

from ullme.data import row_cache


def content(source):
    return [source[row] for row in range(len(source))]


def folders(cache: str) -> list[Path]:
    return [folder for folder, _, _ in row_cache.entries(row_cache.cache_root(cache))]


def change(path: Path, how: str) -> None:
    before = path.stat()
    text = path.read_text()
    if how == "longer":
        path.write_text(text + '{"query": "new", "pos": ["p"]}\n')
    elif how == "cut":
        path.write_text(text[: text.rindex("\n", 0, -1) + 1])
    else:  # same length, same time
        path.write_text(text.replace("query 0", "QUERY 0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
