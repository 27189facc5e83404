"""Modes of a module, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class HasModes(Protocol):
    """What torch.nn.Module has of it."""

    training: bool

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


@contextmanager
def evaluation_mode(module: HasModes) -> Iterator[None]:
    """Context in which a module has no dropout; afterwards it is in the mode it was in before."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
