"""Where the package's messages go when a command runs."""

from __future__ import annotations

import logging


def show_messages(name: str) -> None:
    """Write what a logger of the package says, from INFO on, to stderr; nothing where the application has handlers.

    Python itself shows warnings only.

    Args:
        name: of the logger.
    """
    logger = logging.getLogger(name)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a library that adds a handler later would say all twice
