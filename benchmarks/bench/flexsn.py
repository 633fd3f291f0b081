"""The same neurons for SpikingJelly 2's FlexSN, which scans a step function in one Triton kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, surrogate
from spikingjelly.activation_based.neuron import FlexSN
from torch import Tensor, nn

from .neurons import ours

# A step function may not have a module in its closure, but it may use a global one.
ATAN, RECT = surrogate.ATan(alpha=2.0), surrogate.Rect(alpha=1.0)

PARAMETERS = {
    "klif": ("k",),
    "glif-layer": ("alpha", "beta", "gamma", "tau", "v_threshold", "linear_decay", "v_subreset"),
    "user": ("step_up",),
}
"""The parameters of each layer in the order in which its step function takes them.

FlexSN takes them as scalars in the input's dtype.
"""


def klif(x: Tensor, v: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return functional.klif_step(x, v, k, 2.0, True, False, 1.0, 0.0, ATAN)


def clif(x: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    decayed = v * 0.5 + x
    spike = RECT(decayed - 1.0)
    m = m * torch.sigmoid(decayed * 0.5) + spike
    return spike, decayed - spike * (1.0 + torch.sigmoid(m)), m


def glif(
    x: Tensor, conduct: Tensor, v: Tensor, spike: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, tau: Tensor,
    v_threshold: Tensor, linear_decay: Tensor, v_subreset: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    spike, v = functional.gated_lif_step(
        x, v, spike, alpha, beta, gamma, tau, v_threshold, linear_decay, v_subreset, conduct, RECT
    )
    return spike, v, spike * 1.0  # an output must be another tensor than a state


def lif(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    charged = v + (x - v) * 0.5
    spike = ATAN(charged - 1.0)
    return spike, (1.0 - spike) * charged


def rising_threshold(x: Tensor, v: Tensor, rise: Tensor, step_up: Tensor) -> tuple[Tensor, ...]:
    v, rise = 0.5 * v + x, 0.9 * rise
    spike = ATAN(v - 1.0 - rise)
    return spike, v - spike, rise + step_up * spike


CORES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], int]] = {
    "klif": (klif, 1),
    "clif": (clif, 2),
    "glif-layer": (glif, 2),
    "lif": (lif, 1),
    "user": (rising_threshold, 2),
}
"""By neuron, the step function and the number of its states."""


class FlexNode(nn.Module):
    """A FlexSN with named parameters that starts every sequence at zero states, so there is nothing to reset."""

    conduct: Tensor

    def __init__(self, neuron: str, steps: int) -> None:
        super().__init__()
        self.neuron = neuron
        for name, parameter in ours(neuron, "torch", steps, 1).named_parameters():
            self.register_parameter(name, parameter)
        core, states = CORES[neuron]
        names = PARAMETERS.get(neuron, ())
        self.flex = FlexSN(core, states, static_inputs=tuple(torch.zeros(()) for _ in names))
        self.flex._buffers.clear()  # every call brings the values, which it computes from the parameters

    def forward(self, x_seq: Tensor) -> Tensor:
        inputs: tuple[Tensor, ...] = (x_seq,)
        values = [getattr(self, name) for name in PARAMETERS.get(self.neuron, ())]
        if self.neuron == "glif-layer":
            values = [value.sigmoid() for value in values]
            conduct = self.conduct.sigmoid().to(x_seq.dtype)
            inputs = (x_seq, conduct.view(-1, *(1,) * (x_seq.ndim - 1)).expand_as(x_seq))
        states = FlexSN.init_states(self.flex.num_states, "m", *inputs)
        static = tuple(value.to(x_seq.dtype) for value in values)
        (spikes,), _ = self.flex.multi_step_functional_forward(inputs, states, static_inputs=static)
        return spikes
