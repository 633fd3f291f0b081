"""States as numbers and as tensors."""

from __future__ import annotations

import enum
from numbers import Real
from typing import Any

import torch
from torch import Tensor

State = float | Tensor
"""A state: shaped as a step's input, or a number for all of its neurons."""

NUMBERS = {int, float}
"""The types of states that are numbers."""


class _NotKept(enum.Enum):
    NOT_KEPT = "not kept"


NOT_KEPT = _NotKept.NOT_KEPT
"""Stands for a state that ``keep_state=False`` does not keep. It stays the same object in copies and pickles."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and arithmetic for an input dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fit_state(neuron: str, name: str, value: Any, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> State:
    """A state fitted to a step: a number or a 0-dimensional tensor as it is, else broadcast and converted.

    :raises ValueError: if it is neither a number nor a dense, real tensor, if it cannot be broadcast to the step's
        shape, or is on another device
    """
    if not isinstance(value, Tensor):
        if not isinstance(value, (int, float, Real)):  # torch.compile knows the first two
            raise ValueError(f"{neuron}: state {name!r}: expected a number or a tensor, got {value!r}")
        return value  # type: ignore[return-value]
    if value.layout is not torch.strided or value.is_nested or value.is_complex() or value.is_quantized:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(
            f"{neuron}: state {name!r}: expected a dense tensor of real numbers, got {value.dtype} of layout {layout}"
        )
    if not value.ndim:
        return value
    if value.shape != shape:
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{neuron}: state {name!r}: expected a shape that broadcasts to a step of shape {tuple(shape)}, got "
                f"{tuple(value.shape)}; reset the neuron, or give the state for this input"
            )
        value = value.expand(shape)
    if value.device != device:
        raise ValueError(
            f"{neuron}: state {name!r}: expected it on the input's device {device}, got {value.device}; move it with "
            f".to({str(device)!r}), or reset the neuron"
        )
    return value if value.dtype == dtype else value.to(dtype)


def as_state(value: State, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A fitted state as a tensor shaped as x; a number or 0-dimensional tensor fills it."""
    if isinstance(value, Tensor):
        return value if value.ndim else value.to(x.device, dtype).expand_as(x)
    return torch.full_like(x, value, dtype=dtype, requires_grad=False)
