"""States as numbers and as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

State = float | Tensor
"""A state: shaped as a step's input, or a number for all of its neurons."""

NUMBERS = {int, float}
"""The types of states that are numbers."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and arithmetic for an input dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_state(value: State, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A state as a tensor shaped as x; a number or 0-dimensional tensor fills it."""
    if isinstance(value, Tensor):
        return value if value.ndim else value.to(x.device, dtype).expand_as(x)
    return torch.full_like(x, value, dtype=dtype, requires_grad=False)
