"""Checkpoints of a model that is split over ranks: the same files as everywhere, and an adapter is saved as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from ullme.engine import fsdp

if TYPE_CHECKING:
    from ullme.training.module import ULLMEModule


def install(module: ULLMEModule, strategy: FSDPStrategy | ModelParallelStrategy) -> None:
    """Replace what a sharding strategy does to load and save, before ``module.model`` is set."""
    _load_any_checkpoint(module, strategy)
    _gather_no_adapter(module, strategy)


def _load_any_checkpoint(module: ULLMEModule, strategy: FSDPStrategy | ModelParallelStrategy) -> None:
    """Load the checkpoints of every strategy.

    Lightning's FSDP strategies copy the weights before on_load_checkpoint is called, and expect optimizer states of all
    weights, not of the trained ones. An adapter is not sharded, so its weights and states are copied as they are.
    """
    from ullme.models.trained_weights import STATE_PREFIX, check_can_resume
    from ullme.utils import atomic_files

    load = strategy.load_checkpoint

    def load_checked(path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        stored = atomic_files.checked(path)
        check_can_resume(module.model, stored, str(path))
        if not fsdp.whole_parameters(module.model):
            return load(path, *args, **kwargs)
        state = {name.removeprefix(STATE_PREFIX): value for name, value in stored["state_dict"].items()}
        fsdp.copy_whole(module.model, state)
        for optimizer, value in zip(strategy.optimizers, stored["optimizer_states"], strict=False):
            optimizer.load_state_dict(value)
        return stored

    strategy.load_checkpoint = load_checked  # type: ignore[assignment,method-assign]


def _gather_no_adapter(module: ULLMEModule, strategy: FSDPStrategy | ModelParallelStrategy) -> None:
    """Save an adapter, which every rank holds whole, without the gathering of all weights that Lightning does."""
    from ullme.models.trained_weights import STATE_PREFIX

    gathered_state, gathered_optimizer = strategy.lightning_module_state_dict, strategy.optimizer_state

    def state() -> dict[str, Any]:
        if not fsdp.whole_parameters(module.model):
            return gathered_state()
        return {STATE_PREFIX + name: value for name, value in fsdp.whole_state(module.model).items()}

    def optimizer_state(optimizer: Any) -> dict[str, Any]:
        if not fsdp.whole_parameters(module.model):
            return gathered_optimizer(optimizer)
        return Strategy.optimizer_state(strategy, optimizer)

    strategy.lightning_module_state_dict = state  # type: ignore[method-assign]
    strategy.optimizer_state = optimizer_state  # type: ignore[method-assign]
