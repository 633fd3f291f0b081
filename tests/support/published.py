"""Published neurons, each written from its equations as a user of SpikingJelly would write it.

They are BaseNodes with charge, fire and reset, as 0.0.0.0.14's tutorials teach; the ones named ``...Functional`` are
written as SpikingJelly 2's are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn


class Node(neuron.BaseNode):
    """A neuron with several states."""

    v: Any
    dendrite: Tensor
    second: Tensor
    third: Tensor
    fatigue: Tensor
    rest: Tensor
    u: Tensor
    current: Tensor

    def __init__(self, *states: str, **options: Any) -> None:
        super().__init__(**{"surrogate_function": surrogate.ATan(), **options})
        for name in states:
            self.register_memory(name, 0.0)

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        if self.v_reset is None:
            self.v = self.v - spike * self.v_threshold
        else:
            self.v = (1.0 - spike) * self.v + spike * self.v_reset


class TCLIF(Node):
    """TC-LIF (arXiv 2308.13250): a dendrite and a soma, coupled both ways by a learned vector of two decays."""

    def __init__(self) -> None:
        super().__init__("dendrite", v_reset=None)
        self.decay_factor = nn.Parameter(torch.tensor([-0.5, 0.4]))
        self.gamma = 0.5

    def neuronal_charge(self, x: Tensor) -> None:
        beta = torch.sigmoid(self.decay_factor)
        self.dendrite = self.dendrite - beta[0] * self.v + x
        self.v = self.v + beta[1] * self.dendrite

    def neuronal_reset(self, spike: Tensor) -> None:
        self.dendrite = self.dendrite - self.gamma * spike
        self.v = self.v - self.v_threshold * spike


class TSLIF(Node):
    """TS-LIF (arXiv 2503.05108): two compartments that both fire; their spikes are mixed. Parameters are [1, D]."""

    def __init__(self, features: int = 5) -> None:
        super().__init__("dendrite", v_reset=None)
        self.alpha = nn.Parameter(torch.linspace(-1.0, 1.0, 2 * features).view(2, 1, features))
        self.beta = nn.Parameter(torch.full((1, features), 0.3))
        self.mix = nn.Parameter(torch.linspace(0.1, 0.9, features).view(1, features))

    def neuronal_charge(self, x: Tensor) -> None:
        keep = self.alpha.sigmoid()
        dendrite, soma = self.dendrite, self.v
        self.dendrite = keep[0] * dendrite + x - self.beta * soma
        self.v = keep[1] * soma + (1.0 - self.beta) * self.dendrite

    def neuronal_fire(self) -> Tensor:
        first = self.surrogate_function(self.dendrite - self.v_threshold)
        second = self.surrogate_function(self.v - self.v_threshold)
        return self.mix * first + (1.0 - self.mix) * second

    def neuronal_reset(self, spike: Tensor) -> None:
        self.dendrite = self.dendrite - 0.5 * spike
        self.v = self.v - self.v_threshold * spike


class Quantize(torch.autograd.Function):
    """Round and clamp to 0 ... most; the gradient goes straight through within the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return torch.round(torch.clamp(x, 0.0, most))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x >= 0.0) & (x <= ctx.most), grad, torch.zeros_like(grad)), None


class ILIF(Node):
    """I-LIF (SpikeYOLO, arXiv 2407.20708): integer spikes up to D."""

    def __init__(self, most: int = 4) -> None:
        super().__init__(v_reset=None)
        self.most = float(most)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.25 * self.v + x

    def neuronal_fire(self) -> Tensor:
        return Quantize.apply(self.v, self.most)

    def neuronal_reset(self, spike: Tensor) -> None:
        self.v = self.v - spike.detach()


class TernaryLIF(Node):
    """Ternary spikes (arXiv 2312.06372): -1, 0 and 1, of a learned amplitude."""

    def __init__(self) -> None:
        super().__init__()
        self.amplitude = nn.Parameter(torch.tensor([0.8]))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x - self.v) / 2.0

    def neuronal_fire(self) -> Tensor:
        positive = self.surrogate_function(self.v - 0.5)
        negative = self.surrogate_function(-self.v - 0.5)
        return self.amplitude * (positive - negative)

    def neuronal_reset(self, spike: Tensor) -> None:
        self.v = torch.where(spike.detach() == 0.0, self.v, torch.zeros_like(self.v))


class MLF(Node):
    """MLF (arXiv 2203.10255): three thresholds, the spikes of which add up."""

    def __init__(self) -> None:
        super().__init__("second", "third")

    def neuronal_charge(self, x: Tensor) -> None:
        self.v, self.second, self.third = (0.25 * v + x for v in (self.v, self.second, self.third))

    def neuronal_fire(self) -> Tensor:
        levels = zip((self.v, self.second, self.third), (0.6, 1.6, 2.6), strict=True)
        return sum(self.surrogate_function(v - level) for v, level in levels)

    def neuronal_reset(self, spike: Tensor) -> None:
        levels = ("v", 0.6), ("second", 1.6), ("third", 2.6)
        for name, level in levels:
            v = getattr(self, name)
            setattr(self, name, v * (1.0 - self.surrogate_function(v - level)))


class ALIF(Node):
    """ALIF (LSNN, arXiv 1803.09574): a threshold that rises with every spike and decays, per feature."""

    def __init__(self, features: int = 5) -> None:
        super().__init__("fatigue", v_reset=None)
        self.rho = nn.Parameter(torch.linspace(0.0, 3.0, features))
        self.beta = nn.Parameter(torch.full((features,), 0.4))

    def threshold(self) -> Tensor:
        """A helper method, as users write them."""
        return self.v_threshold + self.beta * self.fatigue

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.8 * self.v + x

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.threshold())

    def neuronal_reset(self, spike: Tensor) -> None:
        rho = self.rho.sigmoid()
        self.v = self.v - self.threshold() * spike
        self.fatigue = rho * self.fatigue + (1.0 - rho) * spike


class IMP(Node):
    """IMP (arXiv 2208.04204): the membrane potential that a sequence starts from is learned."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.initial = nn.Parameter(torch.linspace(-0.5, 0.5, features))

    # 0.0.0.0.14 asks for the first state here ...
    def v_float_to_tensor(self, x: Tensor) -> None:
        held: Any = self.v
        if isinstance(held, float):
            self.v = self.initial.to(x.dtype).expand_as(x)

    # ... and SpikingJelly 2 here.
    def materialize_states(self, inputs: Any, states: Any, step_mode: str) -> Any:
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        return tuple(self.initial.to(x.dtype).expand_as(x) if isinstance(v, float) else v for v in states)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x - self.v) / 2.0


class RefractoryLIF(Node):
    """LIF that cannot fire for two steps after a spike."""

    def __init__(self) -> None:
        super().__init__("rest")

    def neuronal_charge(self, x: Tensor) -> None:
        self.rest = self.rest + torch.zeros_like(x)  # 0.0.0.0.14 starts it as a number
        self.v = torch.where(self.rest > 0.0, self.v, self.v + (x - self.v) / 1.5)

    def neuronal_reset(self, spike: Tensor) -> None:
        self.rest = torch.where(spike > 0.0, torch.full_like(spike, 2.0), torch.clamp(self.rest - 1.0, min=0.0))
        super().neuronal_reset(spike)


class QIF(Node):
    """Quadratic integrate-and-fire (Gerstner et al., Neuronal Dynamics, 5.3)."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x + self.v * (self.v - 0.8)) / 2.0


class Izhikevich(Node):
    """Izhikevich (IEEE TNN 14, 2003), with its own constants, in steps of half a millisecond."""

    def __init__(self) -> None:
        super().__init__("u", v_threshold=30.0, v_reset=-65.0)

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + 0.5 * (0.04 * self.v**2 + 5.0 * self.v + 140.0 - self.u + 100.0 * x)
        self.u = self.u + 0.5 * 0.02 * (0.2 * self.v - self.u)

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function((self.v - self.v_threshold) / 30.0)

    def neuronal_reset(self, spike: Tensor) -> None:
        super().neuronal_reset(spike)
        self.u = self.u + 8.0 * spike


class ResonateAndFire(Node):
    """Resonate-and-fire (Izhikevich, Neural Networks 14, 2001), of learned frequency per feature."""

    def __init__(self, features: int = 5) -> None:
        super().__init__("current", v_reset=None)
        self.omega = nn.Parameter(torch.linspace(0.5, 2.0, features))
        self.damping = nn.Parameter(torch.tensor(-0.1))

    def neuronal_charge(self, x: Tensor) -> None:
        decay = torch.exp(self.damping)
        cos, sin = torch.cos(self.omega), torch.sin(self.omega)
        v, current = self.v, self.current
        self.current = decay * (cos * current - sin * v) + x
        self.v = decay * (sin * current + cos * v)


class ChannelLIF(Node):
    """LIF with a time constant and a threshold of its own for each channel of an image."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.linspace(1.5, 3.0, channels).view(channels, 1, 1))
        self.level = nn.Parameter(torch.linspace(0.5, 1.0, channels))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x - self.v) / self.tau

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.level.view(1, -1, 1, 1))


class NeuronwiseLIF(Node):
    """LIF with a leak of its own for each neuron, and the surrogate's slope learned per channel."""

    def __init__(self) -> None:
        super().__init__(v_reset=None)
        self.leak = nn.Parameter(torch.linspace(-1.0, 1.0, 4 * 3 * 3).view(4, 3, 3))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * self.leak.sigmoid() + x


class ChannelLIFFunctional(neuron.BaseNode):
    """:class:`ChannelLIF` as SpikingJelly 2 has neurons: one pure step."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(surrogate_function=surrogate.ATan())
        self.tau = nn.Parameter(torch.linspace(1.5, 3.0, channels).view(channels, 1, 1))

    def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        h = states[0] + (inputs[0] - states[0]) / self.tau
        spike = self.surrogate_function(h - self.v_threshold)
        return (spike,), ((1.0 - spike) * h + spike * self.v_reset,)


class ALIFFunctional(neuron.BaseNode):
    """:class:`ALIF` as SpikingJelly 2 has neurons."""

    def __init__(self, features: int = 5) -> None:
        super().__init__(surrogate_function=surrogate.ATan(), v_reset=None)
        self.register_memory("fatigue", 0.0)
        self.rho = nn.Parameter(torch.linspace(0.0, 3.0, features))

    def materialize_states(self, inputs: Any, states: Any, step_mode: str) -> Any:
        v, fatigue = super().materialize_states(inputs, states, step_mode)
        return v, torch.full_like(v, fatigue) if isinstance(fatigue, float) else fatigue

    def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        v, fatigue = states
        v, threshold = 0.8 * v + inputs[0], self.v_threshold + 0.4 * fatigue
        spike = self.surrogate_function(v - threshold)
        rho = self.rho.sigmoid()
        return (spike,), (v - threshold * spike, rho * fatigue + (1.0 - rho) * spike)


# What users derive from LIFNode.


class SoftThresholdLIF(neuron.LIFNode):
    """A LIFNode whose firing alone is its own."""

    def __init__(self) -> None:
        super().__init__(tau=2.5)
        self.shift = nn.Parameter(torch.tensor(0.1))

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.v_threshold + self.shift)


class DrivenLIF(neuron.LIFNode):
    """A LIFNode whose charge goes on from LIFNode's own."""

    v: Any

    def __init__(self) -> None:
        super().__init__(tau=2.0)
        self.drive = math.pi / 10

    def neuronal_charge(self, x: Tensor) -> None:
        super().neuronal_charge(x)
        self.v = self.v + self.drive


NEURONS = (
    TCLIF, TSLIF, ILIF, TernaryLIF, MLF, ALIF, IMP, RefractoryLIF, QIF, Izhikevich, ResonateAndFire, ChannelLIF,
    NeuronwiseLIF,
)  # fmt: skip
FUNCTIONAL = (ChannelLIFFunctional, ALIFFunctional)
DERIVED = (SoftThresholdLIF, DrivenLIF)
