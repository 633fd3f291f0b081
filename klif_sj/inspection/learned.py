"""The parameters that spiking neurons learn, as their equations use them, and how near they are to their bounds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor, nn

from ..neuron import FusedNode, GLIFNode
from ..neuron.parameters import PerStep


@dataclass(frozen=True)
class LearnedParameter:
    """The values of one parameter of a layer; ``bounds`` is None if it has none.

    ``to_bound`` is the smallest distance of a value to a bound, as a share of the distance between the bounds.
    ``at_bound`` is the share of the values whose distance to a bound is at most 0.1 % of that between the bounds.
    """

    values: int
    mean: float
    low: float
    high: float
    bounds: tuple[float, float] | None = None
    to_bound: float | None = None
    at_bound: float = 0.0
    learned: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The parameter as plain values, for JSON."""
        return asdict(self)


AT_BOUND = 1e-3
"""A value is at a bound if their distance is at most this share of the distance between the bounds."""


@torch.no_grad()
def learned_parameters(node: nn.Module) -> dict[str, LearnedParameter]:
    """The parameters of a neuron and of its surrogate function by name, in the form that the equations use.

    The attribute ``NAME_bounds`` gives the bounds of a parameter ``NAME``. The bounds of a sigmoid are 0 and 1.
    """
    parameters: dict[str, LearnedParameter] = {}
    if isinstance(node, FusedNode):
        raw = dict(node.named_parameters(recurse=False))
        for name, value in node.effective_parameters().items():
            tensor = value.values if isinstance(value, PerStep) else value
            learned = raw[name].requires_grad if name in raw else True
            if isinstance(node, GLIFNode):
                # GLIF's hard gates are 0 or 1 by intent, so the sigmoids beneath them are compared with the bounds.
                parameters[name] = _described(raw[name].sigmoid(), (0.0, 1.0), learned)
            else:
                parameters[name] = _described(tensor, getattr(node, f"{name}_bounds", None), learned)
    for path, parameter in node.named_parameters():
        name = path.rpartition(".")[2]
        if path in parameters:
            continue
        if path == "w" and type(node).__name__.startswith("ParametricLIF"):
            parameters["tau"] = _described(1 / parameter.sigmoid(), (1.0, math.inf), parameter.requires_grad)
            continue
        holder = node.get_submodule(path.rpartition(".")[0])
        bounds = getattr(holder, f"{name}_bounds", None)
        value = parameter if bounds is None else parameter.clamp(*bounds)
        parameters[path] = _described(value, bounds, parameter.requires_grad)
    return parameters


def effective_threshold(node: MemoryModule) -> Any:
    """The threshold that a neuron's equations use: a number, a tensor, or None."""
    if isinstance(node, FusedNode):
        value = node.effective_parameters().get("v_threshold")
        if value is not None:
            return value.values if isinstance(value, PerStep) else value
    return getattr(node, "v_threshold", None)


def _described(tensor: Tensor, bounds: tuple[float, float] | None, learned: bool) -> LearnedParameter:
    values = tensor.detach().double().flatten()
    figures = (values.numel(), float(values.mean()), float(values.min()), float(values.max()))
    if bounds is None:
        return LearnedParameter(*figures, learned=learned)
    low, high = map(float, bounds)
    to_low = values - low
    # Without an upper bound, the distance is relative to the lower one.
    share = to_low / max(abs(low), 1.0) if math.isinf(high) else torch.minimum(to_low, high - values) / (high - low)
    at_bound = float((share <= AT_BOUND).double().mean())
    return LearnedParameter(*figures, (low, high), float(share.min()), at_bound, learned)
