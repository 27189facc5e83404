"""How many tokens a sentence-transformers model can embed."""

from __future__ import annotations

from typing import Any

from torch import nn


def set_max_length(model: Any, max_length: int) -> None:
    """Let a SentenceTransformer embed so many tokens of a text, or as many as it has positions, as an ULLME does.

    With more it fails in its forward: BERT has 512, and RoBERTa a table of 514 rows, two of which no token has.
    """
    positions = _positions(model)
    model.max_seq_length = max_length if positions is None else min(max_length, positions)


def _positions(model: Any) -> int | None:
    """Tokens with a position; None where there is no saying."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(getattr(model[0], "config", None), "max_position_embeddings", None)
