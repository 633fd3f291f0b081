"""Neurons by name, for the command line and the reports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import BaseNode, LIFNode
from torch import nn

from .._checks import nearest
from ..coding import NeuronFactory
from ..neuron import CLIFNode, GLIFNode, KLIFNode

__all__ = ["NEURONS", "neuron_factory", "spiking_layers"]


def lif(time_steps: int, backend: str) -> NeuronFactory:
    """SpikingJelly's own LIFNode, which has no part in our backends, with the surrogate that KLIF uses."""
    return lambda: LIFNode(surrogate_function=surrogate.ATan(alpha=2.0))


def klif(**options: Any) -> Callable[[int, str], NeuronFactory]:
    """KLIFNode with these options."""
    return lambda time_steps, backend: partial(KLIFNode, backend=backend, **options)


def clif(time_steps: int, backend: str) -> NeuronFactory:
    """CLIFNode with its authors' defaults."""
    return partial(CLIFNode, backend=backend)


def glif(time_steps: int, backend: str) -> NeuronFactory:
    """The channel-wise GLIFNode, with its authors' defaults."""
    return lambda channels: GLIFNode(time_steps, channels, backend=backend)


NEURONS: dict[str, Callable[[int, str], NeuronFactory]] = {
    "lif": lif,
    "klif": klif(),
    "klif-star": klif(scale_reset=True),
    "klif-only-k": klif(activation="identity"),
    "klif-only-relu": klif(learn_k=False),
    "klif-celu": klif(activation="celu"),
    "klif-leaky-relu": klif(activation="leaky_relu"),
    "clif": clif,
    "glif": glif,
}
"""For each name, what makes a factory of that neuron for T time steps and a backend."""

ALIASES = {"klif*": "klif-star"}


def canonical_name(name: str) -> str:
    """The name under which a neuron is registered.

    :raises ValueError: for a neuron that is not, suggesting the nearest names
    """
    wanted = name.strip().lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted in NEURONS:
        return wanted
    suggestion = nearest(wanted, [*NEURONS, *ALIASES])
    raise ValueError(f"neuron: expected one of {', '.join(NEURONS)}, got {name!r}{suggestion}")


def neuron_factory(name: str, time_steps: int, backend: str = "auto") -> NeuronFactory:
    """A factory of the neuron called ``name``.

    :param time_steps: T, the length of the sequences that it will see
    :param backend: backend of this package's neurons; SpikingJelly's own run as they are
    :raises ValueError: for an unknown name
    """
    return NEURONS[canonical_name(name)](time_steps, backend)


def spiking_layers(net: nn.Module) -> dict[str, BaseNode]:
    """The spiking neurons of a network by the name of their layer, from input to output."""
    return {
        name.removesuffix(".neuron"): module for name, module in net.named_modules() if isinstance(module, BaseNode)
    }
