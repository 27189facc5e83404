"""Numbers of the host on a device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Integer and bool arrays as int64 and bool tensors, all in one copy.

    On CUDA the copy is from pinned memory, in the order of the stream: the host goes on, whatever the device computes.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(_storable(array))) for array in arrays]
    flat = torch.from_numpy(np.concatenate([np.ravel(array).astype(np.int64, copy=False) for array in arrays]))
    if torch.cuda.is_available():
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    shaped = [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
    return [part.bool() if array.dtype == bool else part for part, array in zip(shaped, arrays, strict=True)]


def _storable(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == bool else array.astype(np.int64, copy=False)
