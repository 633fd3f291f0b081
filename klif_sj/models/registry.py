"""The papers' networks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from .._checks import check_bool, check_number, nearest
from ..coding import NeuronFactory
from .convnet import TABLE_1, table_1_network
from .resnet import preact_resnet18, resnet18, resnet18_glif, resnet19
from .spiking_network import SpikingNetwork
from .vgg import vgg11, vgg16

__all__ = ["NETWORKS", "NetworkBuilder", "build_network", "canonical_network"]

NetworkBuilder = Callable[..., SpikingNetwork]
"""Builds a network from a neuron, T, and the keywords ``in_channels``, ``image_size``, ``classes`` and ``width``."""

NETWORKS: dict[str, NetworkBuilder] = {
    **{row: partial(table_1_network, row) for row in TABLE_1},
    "vgg16": vgg16,
    "resnet18": resnet18,
    "preact-resnet18": preact_resnet18,
    "vgg11": vgg11,
    "resnet18-glif": resnet18_glif,
    "resnet19": resnet19,
}
"""Four networks of the KLIF paper's Table 1 and two of its ablation, two of CLIF, two of GLIF; see docs/networks.md."""


def canonical_network(name: str) -> str:
    """The name under which a network is registered.

    :raises ValueError: for an unknown network, suggesting the nearest name
    """
    wanted = name.strip().lower()
    if wanted in NETWORKS:
        return wanted
    raise ValueError(f"network: expected one of {', '.join(NETWORKS)}, got {name!r}{nearest(wanted, NETWORKS)}")


def build_network(
    name: str,
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
    coding: bool | None = None,
    dropout: float | None = None,
) -> SpikingNetwork:
    """The network called ``name``, with any neuron.

    :param name: one of :data:`NETWORKS`
    :param neuron: class or factory of the neuron, such as ``neuron_factory("klif", time_steps)`` makes
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of an image or a frame
    :param image_size: its height and width in pixels
    :param classes: number of classes
    :param width: factor on the published channels and features
    :param coding: whether vgg16 or resnet18 has the KLIF paper's coding layers; None means that it has none
    :param dropout: rate of the dropout of vgg11; None keeps the network's own

    :raises ValueError: for an unknown network, a size below 1, a width that leaves no channel, an image too small for
        the network, or an option that the network does not have
    :raises TypeError: for a neuron that cannot be called; for resnet18-glif and resnet19, also for a neuron without a
        number as its threshold
    """
    build = NETWORKS[canonical_network(name)]
    if not callable(neuron):
        raise TypeError(
            f"neuron: expected a class or a factory of a neuron, such as neuron_factory('klif', {time_steps}), "
            f"got {neuron!r}"
        )
    sizes = {"in_channels": in_channels, "image_size": image_size, "classes": classes}
    for size, number in {"time_steps": time_steps, **sizes}.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{size}: expected a positive integer, got {number!r}")
    options: dict[str, Any] = {}
    if coding is not None:
        options["coding"] = check_bool("coding", coding)
    if dropout is not None:
        options["dropout"] = check_dropout(dropout)
    for option, value in options.items():
        networks_with_option = [
            network for network, builder in NETWORKS.items() if option in inspect.signature(builder).parameters
        ]
        if canonical_network(name) not in networks_with_option:
            raise ValueError(
                f"{option}: expected it for {' or '.join(networks_with_option)} only, got {value!r} for {name!r}"
            )
    return build(neuron, time_steps, **sizes, width=width, **options)


def check_dropout(rate: object) -> float:
    """``rate`` as a float from 0 up to, but not including, 1."""
    number = check_number("dropout", rate)
    if not 0 <= number < 1:
        raise ValueError(f"dropout: expected a rate of at least 0 and below 1, got {rate!r}")
    return number
