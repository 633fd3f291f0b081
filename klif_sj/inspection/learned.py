"""The parameters that spiking neurons learn, as their equations use them, and how near they are to their bounds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron import FusedNode, GLIFNode
from ..neuron.parameters import PerStep


@dataclass(frozen=True)
class LearnedParameter:
    """The values of one parameter of a layer. The bounds are None where it has none.

    ``to_bound`` is the least distance to a bound, as a share of the way from one bound to the other; ``at_bound`` the
    share of its values that are within 0.1 % of one.
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
        """As plain values, for JSON."""
        return asdict(self)


AT_BOUND = 1e-3
"""Of the way from one bound to the other."""


@torch.no_grad()
def learned_parameters(node: nn.Module) -> dict[str, LearnedParameter]:
    """By name, the parameters of a neuron and of its surrogate function, in the form that its equations use.

    A bound of a parameter ``NAME`` is what the attribute ``NAME_bounds`` says, and 0 and 1 for what a sigmoid gives.
    """
    found: dict[str, LearnedParameter] = {}
    if isinstance(node, FusedNode):
        raw = dict(node.named_parameters(recurse=False))
        for name, value in node.effective_parameters().items():
            tensor = value.values if isinstance(value, PerStep) else value
            learned = raw[name].requires_grad if name in raw else True
            if isinstance(node, GLIFNode):
                # Its hard gates are 0 or 1 by intent: what may come near its bound is the sigmoid beneath.
                found[name] = _described(raw[name].sigmoid(), (0.0, 1.0), learned)
            else:
                found[name] = _described(tensor, getattr(node, f"{name}_bounds", None), learned)
    for path, parameter in node.named_parameters():
        name = path.rpartition(".")[2]
        if path in found:
            continue
        if path == "w" and type(node).__name__.startswith("ParametricLIF"):
            found["tau"] = _described(1 / parameter.sigmoid(), (1.0, math.inf), parameter.requires_grad)
            continue
        holder = node.get_submodule(path.rpartition(".")[0])
        bounds = getattr(holder, f"{name}_bounds", None)
        value = parameter if bounds is None else parameter.clamp(*bounds)
        found[path] = _described(value, bounds, parameter.requires_grad)
    return found


def effective_threshold(node: Any) -> Any:
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
    # Without an upper bound, the distance is in terms of the lower one.
    share = to_low / max(abs(low), 1.0) if math.isinf(high) else torch.minimum(to_low, high - values) / (high - low)
    at_bound = float((share <= AT_BOUND).double().mean())
    return LearnedParameter(*figures, (low, high), float(share.min()), at_bound, learned)
