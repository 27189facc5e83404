"""Scores of quantised embeddings, by mteb's CompressionWrapper."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mteb.models import CompressionWrapper

# mteb's names, which are sentence-transformers'. A vector's bytes for D dimensions: 4 D, D, D and D / 8.
PRECISIONS = ("float32", "int8", "uint8", "binary")


def check_precision(precision: str) -> None:
    """Raises: ValueError: a precision that is not evaluated."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")


def compressed(model: Any, precision: str) -> Any:
    """An mteb encoder whose embeddings are quantised before they are compared.

    The ranges of int8 and uint8 are those of the texts that mteb embeds together (all queries; up to 50,000
    documents). binary keeps whether a component is positive, as 1 or 0. Either way the similarity stays the model's
    own, of these numbers. mteb files the scores in a folder of their own below the model's revision.

    Args:
        model: an mteb encoder.
        precision: one of :data:`PRECISIONS`; float32 returns the model itself.
    """
    check_precision(precision)
    if precision == "float32":
        return model
    from mteb.types import OutputDType

    # a copy, since the wrapper marks the metadata of what it wraps
    return _wrapper()(copy(model), OutputDType(precision))


def _wrapper() -> type[CompressionWrapper]:
    """mteb's wrapper, which here refuses to score what is not a number."""
    import torch
    from mteb.models import CompressionWrapper

    class Compressed(CompressionWrapper):
        def encode(self, inputs: Any, **kwargs: Any) -> Any:
            """(R, D). Raises: ValueError: a dimension has one value in all texts, so its range is empty."""
            found: Any = super().encode(inputs, **kwargs)
            if not bool(torch.isfinite(found).all()):
                raise ValueError(
                    f"--precision {self._quantization_level.value}: {len(found)} texts are embedded together in "
                    f"{kwargs['task_metadata'].name}, and a dimension has the same value in all of them, so that its "
                    "range is empty; evaluate more texts, or with --precision binary or float32"
                )
            return found

    return Compressed
