"""Copy the tokens of a packed row into groups and back, with a backward that copies too.

PyTorch's backward of ``index_select`` allocates zeros and adds to them. Here each token has one place in the groups,
and the gradient of padding is zero, so that backward is the opposite copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def to_groups(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """(S, ...) the T tokens of a packed row at their places in the groups.

    Args:
        x: (T, ...) tokens.
        positions: (S,) the token at each place, S >= T; padding repeats a token, and the gradient that comes back to
            padding must be zero, as attention's is: what padding puts out is dropped, and nothing attends to it.
        inverse: (T,) the place of each token.
    """
    return _ToGroups.apply(x, positions, inverse)


def from_groups(x: Tensor, inverse: Tensor) -> Tensor:
    """(T, ...) the tokens of (S, ...) places, without padding: undoes :func:`to_groups`."""
    return _FromGroups.apply(x, inverse)


class _ToGroups(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _FromGroups(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.places = len(x)
        return x.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, inverse, grad), None
