"""The neurons that are compared: our nodes, and the parameters that every provider of a neuron gets."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import neuron as spikingjelly_neuron
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, fuse

FUSED = {
    "fused-lif": "LIFNode",
    "fused-plif": "ParametricLIFNode",
    "fused-qif": "QIFNode",
    "fused-eif": "EIFNode",
    "fused-izhikevich": "IzhikevichNode",
}
"""SpikingJelly's own neurons, which ``fuse`` puts onto our kernels."""


class LeakyNode(FusedNode):
    """LIF as SpikingJelly's LIFNode computes it with its defaults, except for the surrogate."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x - self.v) / 2.0


class RisingThresholdNode(FusedNode):
    """A neuron as a user writes it, with two states and one learned parameter for the whole layer."""

    states = ("v", "rise")
    rise: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(v_reset=None, **options)
        self.step_up = nn.Parameter(torch.tensor(0.2))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.5 * self.v + x
        self.rise = 0.9 * self.rise

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.v_threshold - self.rise)

    def neuronal_reset(self, spike: Tensor) -> None:
        super().neuronal_reset(spike)
        self.rise = self.rise + self.step_up * spike


def atan() -> nn.Module:
    return surrogate.ATan(alpha=2.0)


def plain(neuron: str) -> nn.Module:
    """A multi-step node of SpikingJelly's own class, which :data:`FUSED` names."""
    node: nn.Module = getattr(spikingjelly_neuron, FUSED[neuron])(surrogate_function=atan(), step_mode="m")
    return node


def ours(neuron: str, backend: str, steps: int, channels: int, *, keep_state: bool = False) -> Any:
    """Our multi-step node with the package's default surrogates: ATan(2) for KLIF, Rect(1) for CLIF and GLIF.

    By default it keeps no states, because the benchmarks time a training, which resets after every batch.
    """
    if neuron in FUSED:
        node = plain(neuron)
        fuse(node, backend=backend, keep_state=keep_state)
        return node
    options: dict[str, Any] = {"step_mode": "m", "backend": backend, "keep_state": keep_state}
    if neuron == "klif":
        return KLIFNode(init_k=1.2, **options)
    if neuron == "clif":
        return CLIFNode(**options)
    if neuron == "glif-layer":
        return GLIFNode(steps, None, **options)
    if neuron == "glif-channel":
        return GLIFNode(steps, channels, **options)
    return {"lif": LeakyNode, "user": RisingThresholdNode}[neuron](**options)


def parameters(neuron: str, steps: int, channels: int) -> dict[str, Tensor]:
    """The parameters with which every provider of a neuron starts. They are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ours(neuron, "torch", steps, channels).state_dict()
