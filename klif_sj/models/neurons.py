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
from ..fuse import fuse
from ..neuron import CLIFNode, GLIFNode, KLIFNode
from ..surrogate import Rect

__all__ = ["NEURONS", "neuron_factory", "spiking_layers"]


def lif(make_surrogate: Callable[[], nn.Module], **variant: Any) -> Callable[..., NeuronFactory]:
    """A function that makes factories of SpikingJelly's LIFNode, which is fused unless the backend is ``'torch'``."""

    def factory(time_steps: int, backend: str = "auto", **options: Any) -> NeuronFactory:
        def build() -> nn.Module:
            node = LIFNode(surrogate_function=make_surrogate(), **variant)
            if backend != "torch":
                fuse(node, backend=backend, **options)
            return node

        return build

    return factory


def klif(**variant: Any) -> Callable[..., NeuronFactory]:
    """A function that makes factories of a variant of KLIFNode, as in :data:`NEURONS`."""
    return lambda time_steps, **options: partial(KLIFNode, **variant, **options)


def clif(time_steps: int, **options: Any) -> NeuronFactory:
    """A factory of CLIFNode with its authors' defaults."""
    return partial(CLIFNode, **options)


def glif(time_steps: int, **options: Any) -> NeuronFactory:
    """A factory of the channel-wise GLIFNode with its authors' defaults."""
    return lambda channels: GLIFNode(time_steps, channels, **options)


NEURONS: dict[str, Callable[..., NeuronFactory]] = {
    "lif": lif(partial(surrogate.ATan, alpha=2.0)),
    "klif": klif(),
    "klif-star": klif(scale_reset=True),
    "klif-only-k": klif(activation="identity"),
    "klif-only-relu": klif(learn_k=False),
    "klif-celu": klif(activation="celu"),
    "klif-leaky-relu": klif(activation="leaky_relu"),
    "clif-baseline": lif(partial(Rect, alpha=1.0), decay_input=False, v_reset=None),
    "clif": clif,
    "glif": glif,
}
"""For each name, a function of T and of the options that our neurons share, which makes a factory of the neuron.

``lif`` is the LIF with which KLIF is compared, and ``clif-baseline`` the one with which CLIF's authors compare theirs.
Each shares all of that neuron but what the neuron adds.
"""

ALIASES = {"klif*": "klif-star"}


def canonical_name(name: str) -> str:
    """The name under which a neuron is registered.

    :raises ValueError: for an unknown neuron, suggesting the nearest name
    """
    wanted = name.strip().lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted in NEURONS:
        return wanted
    suggestion = nearest(wanted, [*NEURONS, *ALIASES])
    raise ValueError(f"neuron: expected one of {', '.join(NEURONS)}, got {name!r}{suggestion}")


def neuron_factory(name: str, time_steps: int, backend: str = "auto", *, keep_state: bool = True) -> NeuronFactory:
    """A factory of the neuron called ``name``.

    :param time_steps: T, the length of the sequences that it will see
    :param backend: ``'auto'``, ``'cpp'``, ``'cupy'`` or ``'torch'``. With ``'torch'``, SpikingJelly's own neurons run
        as they are; otherwise they are fused (:func:`klif_sj.fuse`).
    :param keep_state: False for a network that is reset after every batch; see :class:`~klif_sj.FusedNode`
    :raises ValueError: for an unknown name
    """
    return NEURONS[canonical_name(name)](time_steps, backend=backend, keep_state=keep_state)


def spiking_layers(net: nn.Module) -> dict[str, BaseNode]:
    """The spiking neurons of a network by the name of their layer, from input to output."""
    return {
        name.removesuffix(".neuron"): module for name, module in net.named_modules() if isinstance(module, BaseNode)
    }
