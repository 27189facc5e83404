r"""A pooling of your own: the largest value of each dimension over a text's tokens.

python train.py fit --config configs/base.yaml --config configs/model/phi-1.5.yaml \
  --model.backbone.pooling my_pooling.largest
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Max pooling.

    There is no padding: the real tokens of all texts are concatenated.

    Args:
        hidden: (T, D) last hidden states, text after text.
        lengths: (R,) tokens of each text, summing to T.

    Returns:
        (R, D), one vector per text; it is L2-normalised afterwards.
    """
    return torch.segment_reduce(hidden.float(), "max", lengths=lengths)
