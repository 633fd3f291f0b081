"""The neurons that are compared: ours, and one node of each kind with the parameters that every provider gets."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode


class LeakyNode(FusedNode):
    """LIF, SpikingJelly's LIFNode with its defaults, but the surrogate."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x - self.v) / 2.0


class RisingThresholdNode(FusedNode):
    """A user's own neuron: two states, and one learned parameter of the whole layer."""

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


def ours(neuron: str, backend: str, steps: int, channels: int, *, keep_state: bool = False) -> FusedNode:
    """Our node, multi-step, with the package's default surrogates: ATan(2) for KLIF, Rect(1) for CLIF and GLIF.

    It keeps no states by default: what is timed is a training, which resets after every batch.
    """
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
    """The parameters that every provider of a neuron starts with, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ours(neuron, "torch", steps, channels).state_dict()
