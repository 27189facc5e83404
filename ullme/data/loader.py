"""The DataLoader of training batches, and the signal handling of its workers."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

# Seconds that a worker lives on after SIGTERM: enough for the current step and its checkpoint.
GRACE = 30


def defer_worker_signals(worker: int) -> None:
    """Keep a worker alive through Ctrl-C and, for a while, SIGTERM: both reach every process of a run, and the main
    process needs batches until it has saved. A ``worker_init_fn``.

    Args:
        worker: its number; not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can be resumed inside an epoch. Its position follows from the trainer's step counter, so its
    state is empty; the two methods tell Lightning that it can be resumed.

    Attributes:
        waited: seconds, over all epochs, spent waiting for batches.
    """

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        started = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
