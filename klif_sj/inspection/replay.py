"""Run a layer's own equations once more in eager torch, on a few of its inputs, to see what no kernel shows.

A spiking neuron fires by ``surrogate_function(u - threshold)``. In a twin of the neuron, another function takes the
place of the surrogate, notes its argument and calls the surrogate. This shows the potential u at every step, and
autograd gives the gradients of u. The layer itself is not changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor, nn

from .._compat import steps
from ..fuse.fused import Fused, fused_class, own_class
from ..neuron import FusedNode

BINS = 64
RANGE = 4.0
"""The histogram of potentials reaches this many thresholds to either side of the threshold."""

MEDIAN_OF = 4096
"""The median is taken over about this many potentials, because sorting all of them would take longer than the rest."""

COVERED_FROM = 0.01
"""A potential is covered where the surrogate's gradient is above this share of its peak."""


@dataclass
class Call:
    """The sample of one call of a layer: copies of the first inputs of the batch, and of what belongs to them."""

    x: Tensor
    single_step: bool
    states: dict[str, Any] | None
    """The states that the call started from; None if it continued from the call before."""
    carried: bool
    """Whether a gradient passes through the states that the call continued from."""
    spikes: Tensor
    gradient: Tensor | None = None
    """The gradient of the loss with respect to the spikes."""


@dataclass
class Replay:
    """What a replay shows of a layer. ``u`` is the potential before firing, measured from the threshold."""

    values: int = 0
    inputs: int = 0
    scale: float = 1.0
    counts: list[int] = field(default_factory=list)
    below: int = 0
    above: int = 0
    covered: float = 0.0
    near: float = 0.0
    distance: float = 0.0
    """The median of abs(u), in thresholds."""
    temporal: list[float] | None = None
    gradient: list[float] | None = None
    unlike: float = 0.0
    """The share of spikes in which the equations and the layer differ."""


class _Noting(nn.Module):
    """A surrogate function that notes its arguments. Its other attributes are those of the original function."""

    def __init__(self, function: Any, noted: list[Tensor]) -> None:
        super().__init__()
        self.__dict__["function"], self.__dict__["noted"] = function, noted

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.noted.append(x)
        return self.function(x, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["function"], name)


Run = Callable[[Tensor, bool], Tensor]
"""Runs a call of a layer, given the input and whether it is a single step."""


def has_surrogate(node: nn.Module) -> bool:
    """Whether a neuron fires by a surrogate function, so that its potentials can be seen."""
    return callable(getattr(node, "surrogate_function", None))


def replay(node: MemoryModule, parameters: dict[str, nn.Parameter], calls: list[Call], scale: float) -> Replay:
    """Run the layer's equations on the sample of its calls.

    :param parameters: the node's own parameters at the time of the calls, as an optimizer may have changed them since
    :param scale: the threshold, which is the unit of distances
    :raises Exception: if the neuron's class does not fire by its surrogate function, step by step or all steps at once;
        an error of any kind, as a user's code runs here
    """
    if isinstance(node, FusedNode):
        return _replay(node, parameters, calls, scale, _our_run)
    first, second = (_own_run, _equations_run) if _runs_otherwise(node) else (_equations_run, _own_run)
    try:
        return _replay(node, parameters, calls, scale, first)
    except Exception:  # for example, the neuron fires all steps at once
        return _replay(node, parameters, calls, scale, second)


def _runs_otherwise(node: nn.Module) -> bool:
    """Whether SpikingJelly runs other code than the equations of the neuron's class."""
    if isinstance(node, Fused):
        return False
    cls: Any = type(node)
    try:
        return steps.step_source(cls).differs
    except steps.NoStepError:
        return True


def _replay(
    node: MemoryModule,
    parameters: dict[str, nn.Parameter],
    calls: list[Call],
    scale: float,
    make_run: Callable[[Any, Any], Run],
) -> Replay:
    noted: list[Tensor] = []
    twin = _twin(node, noted)
    twin._parameters = parameters
    run = make_run(twin, node)
    inputs = [call.x.detach().requires_grad_() for call in calls]
    outputs = []
    with torch.enable_grad(), torch.autocast(calls[0].x.device.type, enabled=False):
        for call, x in zip(calls, inputs, strict=True):
            if call.states is not None:
                twin._memories = dict(call.states)
            elif not call.carried:
                twin._memories = {k: v.detach() if isinstance(v, Tensor) else v for k, v in twin._memories.items()}
            outputs.append(run(x, call.single_step))
        length = sum(1 if call.single_step else len(call.x) for call in calls)
        potentials = _by_step(noted, length, calls[0])
        result = _potentials(node.surrogate_function, potentials, scale)
        result.inputs = calls[0].x.shape[0 if calls[0].single_step else 1]
        differing = [_unlike(out, call.spikes) for out, call in zip(outputs, calls, strict=True)]
        result.unlike = float(torch.stack(differing).mean())
        _gradients(result, potentials, inputs, outputs, calls)
    return result


def _unlike(outputs: Tensor, expected: Tensor) -> Tensor:
    """The share of outputs that differ by more than rounding."""
    return (~outputs.isclose(expected, rtol=1e-3, atol=1e-3, equal_nan=True)).double().mean()


def _by_step(noted: list[Tensor], length: int, call: Call) -> list[Tensor]:
    """The potentials of each time step; those of the whole sequence in one tensor if all steps fire at once."""
    if not noted:
        raise ValueError("it does not fire by its surrogate_function")
    if len(noted) % length == 0:
        return noted[:: len(noted) // length]
    whole = (len(call.x), call.x.numel())
    if len(noted) == 1 and not call.single_step and (len(noted[0]), noted[0].numel()) == whole:
        return noted
    raise ValueError(f"it fires {len(noted)} times in {length} time steps")


def _potentials(function: Any, potentials: list[Tensor], scale: float) -> Replay:
    with torch.no_grad():
        u = torch.cat([potential.detach().flatten() for potential in potentials]).float()
        u = u[u.isfinite()]
    result = Replay(values=len(u), scale=scale)
    if not len(u):
        return result
    slopes = surrogate_slope(function, u)
    peak = max(float(surrogate_slope(function, _grid(u)).max()), float(slopes.max()))
    u = u / scale
    result.covered = float((slopes > COVERED_FROM * peak).double().mean()) if peak > 0 else 0.0
    result.counts = [int(count) for count in torch.histc(u, BINS, -RANGE, RANGE)]
    result.below, result.above = int((u < -RANGE).sum()), int((u > RANGE).sum())
    result.near = float((u.abs() <= 1).double().mean())
    result.distance = float(u[:: 1 + len(u) // MEDIAN_OF].abs().median())
    return result


def _grid(u: Tensor) -> Tensor:
    """Points around 0 among which a surrogate's gradient has its peak, even if it is narrow."""
    near = torch.logspace(-6, 1, 400, device=u.device)
    return torch.cat([-near, near.new_zeros(1), near])


def surrogate_slope(function: Any, u: Tensor) -> Tensor:
    """The magnitude of the surrogate's derivative at each u; 0 if the surrogate has no derivative."""
    with torch.enable_grad():
        u = u.detach().clone().requires_grad_()
        spikes = function(u)
        if not spikes.requires_grad:
            return torch.zeros_like(u)
        (slope,) = torch.autograd.grad(spikes.sum(), u, allow_unused=True)
    return torch.zeros_like(u) if slope is None else slope.abs()


def _gradients(
    result: Replay, potentials: list[Tensor], inputs: list[Tensor], outputs: list[Tensor], calls: list[Call]
) -> None:
    """Fill in the temporal gradient by lag and the gradient of the loss by time step, as means of magnitudes."""
    last = potentials[-1]
    stepwise = len(potentials) == sum(1 if call.single_step else len(call.x) for call in calls)
    with _gradients_of(potentials) as seen:
        if stepwise and last.requires_grad:
            last.sum().backward(inputs=inputs, retain_graph=True)
            firing = _firing(outputs, calls)
            temporal = [_mean(seen.get(t), firing) for t in reversed(range(len(potentials)))]
            # Where an activation is flat, as KLIF's ReLU is at 0, the gradient that passes through time is unknown.
            is_flat = not any(temporal[1:]) and not any(x.grad is not None and x.grad.any() for x in inputs)
            result.temporal = None if is_flat else temporal
        pairs = [(o, c.gradient) for o, c in zip(outputs, calls, strict=True) if c.gradient is not None]
        pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
        if pairs:
            seen.clear()
            torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs], inputs=inputs)
            values = [seen.get(t) for t in range(len(potentials))]
            if not stepwise:
                values = [None] * len(calls[0].x) if values[0] is None else list(values[0])
            result.gradient = [_mean(value) for value in values]


def _firing(outputs: list[Tensor], calls: list[Call]) -> Tensor:
    """A mask of the neurons that fire at least once, for each input; of all neurons if none fires.

    A neuron that never fires only leaks, so its gradient says nothing about gradients that pass through resets.
    """
    fires = [
        (out if call.single_step else out.abs().amax(0)).detach() != 0 for out, call in zip(outputs, calls, strict=True)
    ]
    firing = torch.stack(fires).any(0)
    return firing if firing.any() else torch.ones_like(firing)


def _mean(gradient: Tensor | None, mask: Tensor | None = None) -> float:
    """The mean magnitude, of some elements or of all."""
    if gradient is None:
        return 0.0
    magnitude = gradient.abs().double()
    return float(magnitude.mean() if mask is None else magnitude[mask].mean())


@contextmanager
def _gradients_of(potentials: list[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Collects, by position, the gradient with respect to each potential in a backward pass within the block.

    If a neuron fires by ``surrogate_function(v - threshold)``, its reset uses v as well. So the gradient with respect
    to v is collected; the gradient with respect to the argument would be that of the spike alone.
    """
    seen: dict[int, Tensor] = {}

    def note(position: int, output: int) -> Any:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[output]
            if gradient is not None:
                seen[position] = gradient.detach().clone()

        return hook

    hooks = []
    for position, potential in enumerate(potentials):
        made_by, output = potential.grad_fn, potential.output_nr
        if made_by is not None and made_by.name().startswith("SubBackward") and made_by.next_functions[0][0]:
            made_by, output = made_by.next_functions[0]
        if made_by is not None:
            hooks.append(made_by.register_prehook(note(position, output)))
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def _twin(node: MemoryModule, noted: list[Tensor]) -> Any:
    """A twin of the node, of its unfused class, which has its own states and sub-modules and notes its potentials."""
    twin: Any = object.__new__(own_class(node))
    twin.__dict__.update(node.__dict__, _memories=dict(getattr(node, "_memories", {})))
    twin._buffers = copy.deepcopy(node._buffers)
    twin._modules = {
        name: copy.deepcopy(module) for name, module in node._modules.items() if name != "surrogate_function"
    }
    # In evaluation mode, IF and LIF of SpikingJelly 0.0.0.0.14 fire without their surrogate function.
    twin.__dict__.update(surrogate_function=_Noting(node.surrogate_function, noted), training=True)
    for name in ("store_v_seq", "_store_v_seq", "store_state_seqs", "_store_state_seqs"):
        if name in twin.__dict__:
            twin.__dict__[name] = False
    return twin


def _our_run(twin: Any, node: MemoryModule) -> Run:
    """A function that runs one of our neurons by its equations."""
    twin.__dict__.update(_backend="torch", keep_state=True, _sequence=type(node._sequence)())
    return lambda x, single: twin.single_step_forward(x) if single else twin.multi_step_forward(x)


def _equations_run(twin: Any, node: MemoryModule) -> Run:
    """A function that runs SpikingJelly's neuron, or a user's, by the equations of its single step."""
    cls: Any = type(twin)
    twin.__class__ = fused_class(cls)
    names = node._fused_states if isinstance(node, Fused) else steps.state_names(node)
    twin.__dict__.update(_fused_backend="torch", _fused_keep_state=True, _fused_states=names)

    def run(x: Tensor, single: bool) -> Tensor:
        spikes = twin._fused_run(x, x.unsqueeze(0) if single else x, "s" if single else "m", "equations")
        return spikes[0] if single else spikes

    return run


def _own_run(twin: Any, node: MemoryModule) -> Run:
    """A function that runs a neuron by its own ``forward``."""
    return lambda x, single: twin.forward(x)


def threshold_scale(threshold: Any) -> float:
    """The threshold as one positive number, which is the unit of potentials; 1 if there is no such threshold."""
    value = float(threshold.detach().abs().mean()) if isinstance(threshold, Tensor) else threshold
    if isinstance(value, int | float) and math.isfinite(value) and value > 0:
        return float(value)
    return 1.0
