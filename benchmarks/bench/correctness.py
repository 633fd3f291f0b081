"""The check before anything is timed: a layer must compute what our equations give step by step in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .neurons import ours, parameters
from .workload import Workload

CHUNK = 1 << 21
"""How many neuron-steps of the reference are computed at a time."""

TOLERANCE = {"float32": (1e-4, 3e-3), "float16": (2e-2, 1e-1), "bfloat16": (1e-1, 3e-1)}
"""By dtype, the largest allowed share of spikes that differ and the largest allowed relative RMS error of a gradient.

A rounding changes a spike or a gradient altogether if it happens at the threshold, at the kink of a ReLU or at the edge
of a surrogate's window. Some rivals also keep their states in the input's 16 bits. So a few values may differ.
"""


@dataclass(frozen=True)
class Result:
    """The spikes of a training step, the gradient of its input, and the gradients of the parameters by name."""

    spikes: Tensor
    grad_x: Tensor
    grad_parameters: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    error_spikes: float
    error_gradient: float
    firing_rate: float
    status: str

    @property
    def passed(self) -> bool:
        return self.status == "ok"


def train(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Result:
    """Run one forward and one backward pass."""
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    spikes = run(x)
    grad_x, *grads = torch.autograd.grad(spikes, [x, *learned.values()], grad.to(spikes.dtype), materialize_grads=True)
    return Result(spikes.detach(), grad_x, dict(zip(learned, grads, strict=True)))


def reference(workload: Workload, x: Tensor, grad: Tensor) -> Result:
    """Run our equations in plain torch and float64 on the input that is timed, a part of the batch at a time."""
    steps, batch, channels, *_ = workload.shape
    node = ours(workload.neuron, "torch", steps, channels)
    node.load_state_dict(parameters(workload.neuron, steps, channels))
    node.to(x.device, torch.float64)
    spikes = torch.empty_like(x, dtype=torch.bool)
    grad_x = torch.empty_like(x, dtype=torch.float64)
    totals = {name: torch.zeros_like(p) for name, p in node.named_parameters()}
    rows = max(CHUNK * batch // x.numel(), 1)
    for first in range(0, batch, rows):
        part = slice(first, first + rows)
        node.reset()
        found = train(node, node, x.detach()[:, part].double().requires_grad_(), grad[:, part])
        spikes[:, part], grad_x[:, part] = found.spikes.bool(), found.grad_x
        for name, value in found.grad_parameters.items():
            totals[name] += value
    return Result(spikes, grad_x, totals)


def judge(expected: Result, actual: Result, dtype: str) -> Verdict:
    """Compare spikes, gradients of parameters, and the gradient of x for those neurons whose spikes all agree."""
    differs = (actual.spikes != 0) != expected.spikes
    agrees = ~differs.any(0)
    errors = {"x": relative_rms(actual.grad_x.double() * agrees, expected.grad_x * agrees)}
    for name, value in expected.grad_parameters.items():
        if name not in actual.grad_parameters:
            errors[name] = math.inf
        else:
            errors[name] = relative_rms(actual.grad_parameters[name].double(), value)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    spikes, gradient = differs.double().mean().item(), errors[worst]
    allowed_spikes, allowed_gradient = TOLERANCE[dtype]
    status = "ok"
    if not spikes <= allowed_spikes:
        status = f"refused: {spikes:.2%} of the spikes differ, allowed {allowed_spikes:.2%}"
    elif not gradient <= allowed_gradient:  # NaN is refused too
        status = f"refused: error of the gradient of {worst} {gradient:.2g}, allowed {allowed_gradient:.2g}"
    return Verdict(spikes, gradient, expected.spikes.double().mean().item(), status)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
