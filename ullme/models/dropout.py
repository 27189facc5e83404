"""Dropout inside a pre-trained LLM, which is the noise of unsupervised SimCSE (arXiv 2104.08821)."""

from __future__ import annotations

from torch import nn


def set_attention_dropout(model: nn.Module, share: float) -> None:
    """Drop attention weights while training; the config, by which a pre-trained LLM is known, stays as it is.

    Raises:
        ValueError: the family keeps its attention dropout where this does not find it.
    """
    found = False
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                value.p, found = share, True
            elif isinstance(value, float | int):
                setattr(module, name, share)
                found = True
    if not found:
        raise ValueError(f"attention_dropout={share}: the {type(model).__name__} has none that is known; leave it out")
