"""The loader of training batches, and what its workers do about signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

# Seconds that a worker stays after SIGTERM: the step under way and its checkpoint.
GRACE = 30


def outlast_signals(worker: int) -> None:
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach workers too, but the main process wants batches until it has
    saved. Ctrl-C is its business alone; SIGTERM, which it also sends to workers that are left over, ends them later.

    Args:
        worker: its number, of no consequence.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class ResumableLoader(DataLoader[Any]):
    """A loader whose place follows the trainer's step counter. It has no state of its own to keep; the two methods
    are how Lightning learns that it can be resumed inside an epoch.

    Attributes:
        waited: seconds, over all epochs, in which a batch was asked for and not there.
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
