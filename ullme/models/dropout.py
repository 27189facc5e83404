"""The LLM's own dropout: off, or on attention weights only. Its config, part of the fingerprint, does not change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

# Names of numbers that are probabilities of dropout (attn_pdrop, layerdrop) or the width of a router's noise.
_NOISE = re.compile("drop|jitter")
_OF_ATTENTION = ("attention_dropout", "attn_dropout", "attn_pdrop")
# Where no module has an attribute of such a name, those of attention modules that mean the same (OPT, MPT).
_IN_ATTENTION_MODULES = ("dropout", "attn_dropout_p")


def turn_off_dropout(model: nn.Module) -> None:
    """Set every dropout of an LLM to 0, and the noise on the router of a mixture of experts."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _NOISE.search(name):
                setattr(module, name, 0.0)
        if module is not model:
            _set_in_config(module, lambda name: bool(_NOISE.search(name)), 0.0)


def set_attention_dropout(model: nn.Module, probability: float) -> None:
    """Set the dropout on attention weights in all modules.

    Raises:
        ValueError: the model has no module with a known attribute for attention dropout.
    """
    modules = list(model.modules())
    of_attention = [module for module in modules if "attention" in type(module).__name__.lower()]
    for module in of_attention:
        _set_in_config(module, lambda name: name in _OF_ATTENTION, probability)
    found = _set_attributes(modules, ("attention_dropout", "attn_dropout"), probability)
    if not (found or _set_attributes(of_attention, _IN_ATTENTION_MODULES, probability)):
        raise ValueError(
            f"attention_dropout={probability}: no attention dropout was found in {type(model).__name__}; leave it out"
        )


def _set_attributes(modules: Iterable[nn.Module], names: Iterable[str], probability: float) -> bool:
    """Set attributes that are numbers or dropout modules. Returns: whether some module has one of these names."""
    found = False
    for module, name in product(modules, names):
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout):
            value.p, found = probability, True
        elif isinstance(value, float | int):
            setattr(module, name, probability)
            found = True
    return found


@torch.no_grad()
def check_attention_dropout(model: nn.Module, probability: float, forward: Callable[[], Tensor]) -> None:
    """Check that dropout on attention weights reaches the attention: some families store the number and never use it.

    Runs the model in training mode, once without this dropout and once with a large one, from the same random state.

    Args:
        model: the LLM; it has this dropout afterwards, and is in the mode it was in before.
        probability: of the dropout.
        forward: runs the model on a few tokens and returns hidden states.

    Raises:
        ValueError: both runs give the same hidden states.
    """
    if probability == 0:
        return
    training, device = model.training, next(model.parameters()).device
    results = []
    try:
        model.train()
        for trial in (0.0, 0.5):
            set_attention_dropout(model, trial)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                results.append(forward())
    finally:
        set_attention_dropout(model, probability)
        model.train(training)
    if torch.equal(*results):
        raise ValueError(
            f"attention_dropout={probability}: {type(model).__name__} applies no dropout to attention weights, so the "
            "option would change nothing; leave it out"
        )


def _set_in_config(module: nn.Module, is_meant: Callable[[str], bool], value: float) -> None:
    """Let a module read another value in its config, for those that look a dropout up in every forward (Falcon's).

    The module gets a view of the config that shares all other fields with it, also those that are set later.
    """
    config: Any = vars(module).get("config")
    names = [name for name, old in vars(config).items() if isinstance(old, float) and is_meant(name)] if config else []
    if not any(getattr(config, name) != value for name in names):
        return
    own = {name: property(lambda _: value) for name in names}
    view: Any = object.__new__(type(type(config).__name__, (type(config),), own))
    view.__dict__ = config.__dict__
    module.config = view
