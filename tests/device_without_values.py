"""torch's meta device in the place of a GPU: tensors have a device and a shape and no values.

Whatever would make the host wait for a GPU (``item``, ``tolist``, ``nonzero``, a bool mask as an index, a copy to the CPU)
raises there, as mixing devices does. What is on the host keeps its values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


class CopiesToDevice(TorchDispatchMode):
    """Counts copies of the host's tensors to the device: those that the host waits for, and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = self.passed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == DEVICE and args[0].device.type == "cpu":
            self.passed += bool(kwargs.get("non_blocking"))
            self.waited += not kwargs.get("non_blocking")
        return func(*args, **kwargs)


def on_device(model: Any) -> Any:
    """The model, which was probed where its weights had values."""
    model = model.to(DEVICE)
    model._probed_device_type, model._head_checked = DEVICE.type, True
    return model
