"""The loader of training batches, and what its workers do about Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


def ignore_ctrl_c(worker: int) -> None:
    """A terminal tells workers of Ctrl-C too, but the main process wants batches until it has saved.

    Args:
        worker: its number, of no consequence.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
