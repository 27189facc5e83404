"""Smaller embeddings: the first dimensions only (Matryoshka, arXiv 2205.13147), or fewer bits for each dimension."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from ullme.models.interface import Embedder

logger = logging.getLogger(__name__)

# As sentence-transformers names them; binary and ubinary pack eight dimensions into a byte.
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]

# Model -> the numbers of dimensions that it has been truncated to with a warning, so that each comes once.
_warned: MutableMapping[Any, set[int]] = WeakKeyDictionary()


def check_truncate_dim(truncate_dim: int | None, width: int) -> None:
    """Check a number of dimensions to keep, out of ``width``. Raises: ValueError: there are not so many, or none."""
    if truncate_dim is not None and not 1 <= truncate_dim <= width:
        raise ValueError(
            f"truncate_dim={truncate_dim}: the model's embeddings have {width} dimensions; keep 1 to {width} of them"
        )


def warn_untrained_dim(model: Embedder, truncate_dim: int | None) -> None:
    """Warn, once for each number of dimensions, that training did not make embeddings of so many."""
    trained = (None, model.hidden_size, *model.matryoshka_dims)
    if truncate_dim in trained or truncate_dim in (seen := _warned.setdefault(model, set())):
        return
    assert truncate_dim is not None
    seen.add(truncate_dim)
    dims = ", ".join(map(str, model.matryoshka_dims))
    logger.warning(
        "truncate_dim=%d: %s, so more of the quality is lost than has to be; %s",
        truncate_dim,
        f"training nested the dimensions {dims} only" if dims else "the model was not trained to be truncated",
        "choose one of these" if dims else "train it with configs/loss/matryoshka.yaml",
    )


def check_precision(precision: str, num_texts: int) -> None:
    """Check a precision for so many texts.

    Raises:
        ValueError: an unknown one, or 8 bits for a single text, whose ranges would be empty.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: choose {', '.join(get_args(Precision))}")
    if precision in ("int8", "uint8") and num_texts == 1:
        raise ValueError(
            f"precision={precision!r}: the range of each dimension is taken from the texts, and there is one text "
            "only; encode several together, or encode in float32 and call sentence_transformers.quantize_embeddings "
            "with ranges"
        )


def quantize(embeddings: Tensor, precision: Precision) -> np.ndarray:
    """Fewer bits, by sentence-transformers' ``quantize_embeddings``.

    Args:
        embeddings: (R, D) in float32.
        precision: not float32. int8 and uint8 spread 256 steps over the range that each dimension has in these
            embeddings; binary and ubinary keep the sign.

    Returns:
        (R, D), or (R, ⌈D/8⌉) for binary (int8, the byte less 128) and ubinary (uint8).

    Raises:
        ValueError: sentence-transformers is not installed; or 8 bits for equal embeddings, whose ranges are empty.
    """
    if precision in ("int8", "uint8") and len(embeddings) and bool((embeddings == embeddings[0]).all()):
        raise ValueError(
            f"precision={precision!r}: the range of each dimension is taken from the texts, and all {len(embeddings)} "
            "have the same embedding; encode different texts together, or encode in float32"
        )
    try:
        from sentence_transformers.util import quantize_embeddings
    except ImportError as error:
        raise ValueError(
            f"precision={precision!r} needs sentence-transformers, which is not installed: pip install it, or leave "
            "precision out"
        ) from error
    return quantize_embeddings(embeddings.numpy(), precision)  # type: ignore[return-value]
