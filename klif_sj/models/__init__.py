"""The papers' networks, with any neuron."""

from .convnet import CodedConvNet, mnist_network
from .neurons import NEURONS, neuron_factory, spiking_layers

__all__ = ["NEURONS", "CodedConvNet", "mnist_network", "neuron_factory", "spiking_layers"]
