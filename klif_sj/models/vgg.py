"""Spiking VGG networks: the KLIF paper's VGG-16 and the CLIF authors' VGG-11."""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import nn

from ..coding import ConvEncoder, NeuronFactory
from .blocks import (
    blocks_notation,
    convolution_blocks,
    encoder_notation,
    he_initialise,
    klif_head,
    linear_readout,
    pooled_size,
    scaled,
)
from .spiking_network import SpikingNetwork

__all__ = ["vgg11", "vgg16"]

# The channels of each block's convolutions; the very first convolution, of 64 channels, is the encoder.
VGG16_BLOCKS = ((64,), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG11_BLOCKS = ((), (128,), (256, 256), (512, 512), (512, 512))


def vgg16(
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
    coding: bool = False,
) -> SpikingNetwork:
    """The VGG-16 of the KLIF paper's ablation, with or without its coding layers.

    It has thirteen 3x3 convolutions with BN, five 2x2 max poolings, dropout and a fully connected layer, the usual form
    for small images. With coding layers, three parallel convolutions replace the first one, and the last layer has ten
    neurons for each class, which vote. Without, the last layer is linear and has no neurons.

    The paper names the architecture only. These details are our choice; see docs/networks.md.

    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of the image
    :param image_size: height and width in pixels
    :param classes: number of classes
    :param width: factor on the published channels
    :param coding: whether it has the KLIF paper's encoder and decoder

    :raises ValueError: for a width that leaves no channel, or an image smaller than 32 x 32

    Source: arXiv 2302.09238, Sec. 3.2 and Table 3; Simonyan and Zisserman, ICLR 2015 (configuration D).
    """
    channels = scaled(64, width)
    blocks = [[scaled(size, width) for size in block] for block in VGG16_BLOCKS]
    features = blocks[-1][-1] * pooled_size(image_size, len(blocks)) ** 2
    encoder = ConvEncoder(in_channels, channels, neuron, time_steps, convolutions=3 if coding else 1)
    layers = {
        "encoder": encoder,
        **convolution_blocks(channels, blocks, neuron),
        "flatten": layer.Flatten(step_mode="m"),
    }
    head, head_notation = klif_head(features, classes, neuron, coding)
    notation = (encoder_notation(encoder), *blocks_notation(blocks), head_notation)
    network = SpikingNetwork(layers | head, (in_channels, image_size, image_size), "-".join(notation))
    he_initialise(network)
    return network


def vgg11(
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
    dropout: float = 0.4,
) -> SpikingNetwork:
    """The VGG-11 with which CLIF is reported on event cameras.

    It has eight 3x3 convolutions with BN, each followed by dropout of its spikes, and five 2x2 average poolings. The
    last feature map is averaged to 7 x 7, or stretched if it is smaller. A linear layer without neurons gives the
    classes.

    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of a frame
    :param image_size: height and width in pixels
    :param classes: number of classes
    :param width: factor on the published channels
    :param dropout: rate of the dropout; the authors' is 0.4 for DVS128-Gesture and 0.3 for CIFAR10-DVS

    :raises ValueError: for a width that leaves no channel, or an image smaller than 32 x 32

    Source: Huang et al., ICML 2024, and the authors' code (``spiking_vgg11_bn``).
    """
    channels = scaled(64, width)
    blocks = [[scaled(size, width) for size in block] for block in VGG11_BLOCKS]
    pooled_size(image_size, len(blocks))
    encoder = ConvEncoder(in_channels, channels, neuron, time_steps, convolutions=1)
    layers: dict[str, nn.Module] = {
        "encoder": encoder,
        "dropout": layer.Dropout(dropout, step_mode="m"),
        **convolution_blocks(channels, blocks, neuron, layer.AvgPool2d, dropout),
        "average": layer.AdaptiveAvgPool2d(7, step_mode="m"),
        "flatten": layer.Flatten(step_mode="m"),
        "readout": linear_readout(blocks[-1][-1] * 7**2, classes, std=0.01),
    }
    notation = (encoder_notation(encoder), *blocks_notation(blocks, "AP2"), "AP(7x7)", f"{classes}L")
    network = SpikingNetwork(layers, (in_channels, image_size, image_size), "-".join(notation))
    he_initialise(network)
    return network
