"""Processes that tests start: nothing of how the test suite itself was started decides how they end."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

# Seconds that a test waits for a process. Only one that hangs takes so long, whatever else the machine is doing.
PATIENCE = 600.0
HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    **dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPROF), signal.SIG_DFL),
}


def default_signals() -> None:
    """In a forked process: signals do what they do in a program started from a terminal.

    ``nohup`` and a shell's ``&`` start a program with SIGHUP and SIGINT ignored, and its children inherit that.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def start_process(command: list[str], **options: Any) -> subprocess.Popen:
    """``subprocess.Popen`` of a process with the default signal handlers, which it takes over from this one."""
    earlier = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    try:
        return subprocess.Popen(command, **options)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def wait_until(reached: Callable[[], bool], what: str) -> None:
    """Raises: TimeoutError: ``reached()`` never becomes true."""
    until = time.monotonic() + PATIENCE
    while not reached():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {PATIENCE:.0f} s")
        time.sleep(0.02)
