"""The gate: what is timed must first compute the neuron, compared with our equations in float64, run step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .neurons import ours, parameters
from .workload import Workload

CHUNK = 1 << 21
"""Neuron-steps of the reference that are computed at a time."""

TOLERANCE = {"float32": (1e-4, 3e-3), "float16": (2e-2, 1e-1), "bfloat16": (1e-1, 3e-1)}
"""Greatest share of spikes that differ, and greatest relative RMS error of a gradient.

A rounding at the threshold, at the kink of a ReLU or at the edge of a surrogate's window changes a spike or a gradient
altogether, and some rivals carry their states in the input's 16 bits; so a few may differ, but no more.
"""


@dataclass(frozen=True)
class Result:
    """What a training step yields: spikes, the input's gradient, and those of the parameters by name."""

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
    """One forward and backward."""
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    spikes = run(x)
    grad_x, *grads = torch.autograd.grad(spikes, [x, *learned.values()], grad.to(spikes.dtype), materialize_grads=True)
    return Result(spikes.detach(), grad_x, dict(zip(learned, grads, strict=True)))


def reference(workload: Workload, x: Tensor, grad: Tensor) -> Result:
    """Our equations, in plain torch and float64, on the very input that is timed; a part of the batch at a time."""
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
    """Compare spikes, the gradient of x at neurons whose spikes all agree, and the gradients of all parameters."""
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
    elif not gradient <= allowed_gradient:  # NaN too
        status = f"refused: error of the gradient of {worst} {gradient:.2g}, allowed {allowed_gradient:.2g}"
    return Verdict(spikes, gradient, expected.spikes.double().mean().item(), status)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
