"""The papers' networks, with any neuron."""

from .convnet import CodedConvNet, mnist_network
from .neurons import NEURONS, neuron_factory, spiking_layers
from .registry import NETWORKS, NetworkBuilder, build_network, canonical_network
from .spiking_network import SpikingNetwork

__all__ = [
    "NETWORKS",
    "NEURONS",
    "CodedConvNet",
    "NetworkBuilder",
    "SpikingNetwork",
    "build_network",
    "canonical_network",
    "mnist_network",
    "neuron_factory",
    "spiking_layers",
]
