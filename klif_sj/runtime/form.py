"""The form of tensors: what a call must know of its tensors, besides their values."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_Guards: Any
try:
    _Guards = attrgetter("_dynamo.guards.TensorGuards")(torch._C)  # it is no module that every torch imports
except AttributeError:
    _Guards = None


def form_of(*tensors: Tensor) -> Callable[..., bool] | None:
    """A function that says whether other tensors have the form of these; None if this torch cannot tell.

    A form is the type, dtype, device, shape and strides of each tensor, whether it needs a gradient, and how torch
    dispatches operations on it. The last differs in a mode that watches operations, in a transform, and for a negative
    view. No tensor may come twice: such tensors have no form.

    The comparison is the guard of torch.compile. It takes 0.7 us for nine tensors, and in Python it took 7 us.
    """
    if _Guards is None:
        return None
    sizes, strides = ([list(of(tensor)) for tensor in tensors] for of in (Tensor.size, Tensor.stride))
    has_form: Callable[..., bool] = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return has_form
