"""The convolutional networks of the KLIF paper's Table 1: encoder, blocks of convolutions, decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spikingjelly.activation_based import layer

from ..coding import ConvEncoder, NeuronFactory
from .blocks import (
    blocks_notation,
    convolution_blocks,
    encoder_notation,
    klif_head,
    pooled_size,
    scaled,
    spiking_linear,
)
from .spiking_network import SpikingNetwork

__all__ = ["TABLE_1", "CodedConvNet", "mnist_network", "table_1_network"]


class CodedConvNet(SpikingNetwork):
    """``(cC3+cC3+cC3)(enc) - [nC3-...-MP2] - ... - hFC - (10 neurons a class FC-AP10)(dec)``.

    nC3 is a 3x3 convolution with n channels, BN and spiking neurons; MP2 a 2x2 max pooling; hFC a fully connected layer
    of h spiking neurons. Dropout (0.5) precedes every fully connected layer. The paper leaves two details open: here,
    convolutions keep the image's size (padding 1), and no layer has a bias.

    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of the image
    :param image_size: height and width of the image, in pixels
    :param encoder_channels: c, the channels of each convolution of the encoder
    :param blocks: the channels of each block's convolutions; a block ends in MP2
    :param hidden: h, the features of the fully connected layer
    :param classes: number of classes

    Shape: image ``[N, in_channels, H, W]`` or frames ``[T, N, in_channels, H, W]`` to firing rates ``[N, classes]``.

    :raises ValueError: for an image too small for its max poolings

    Source: arXiv 2302.09238, Table 1.
    """

    def __init__(
        self,
        neuron: NeuronFactory,
        time_steps: int,
        *,
        in_channels: int,
        image_size: int,
        encoder_channels: int,
        blocks: Sequence[Sequence[int]],
        hidden: int,
        classes: int,
    ) -> None:
        size = pooled_size(image_size, len(blocks))
        channels = next((block[-1] for block in reversed(blocks) if block), encoder_channels)
        encoder = ConvEncoder(in_channels, encoder_channels, neuron, time_steps)
        layers = {
            "encoder": encoder,
            **convolution_blocks(encoder_channels, blocks, neuron),
            "flatten": layer.Flatten(step_mode="m"),
            "fc1": spiking_linear(channels * size**2, hidden, neuron),
        }
        head, head_notation = klif_head(hidden, classes, neuron, coding=True)
        notation = (encoder_notation(encoder), *blocks_notation(blocks), f"{hidden}FC", head_notation)
        super().__init__(layers | head, (in_channels, image_size, image_size), "-".join(notation))


class Row(NamedTuple):
    """A network of Table 1: the encoder's channels, the channels of its blocks' convolutions, the hidden features."""

    encoder_channels: int
    blocks: tuple[tuple[int, ...], ...]
    hidden: int


TABLE_1 = {
    "klif-mnist": Row(128, ((128,),), 2048),
    "klif-cifar10": Row(128, ((256, 256, 256),) * 2, 2048),
    "klif-cifar10-dvs": Row(128, ((128,),) * 3, 512),
    "klif-dvs-gesture": Row(128, ((128,),) * 4, 512),
}
"""The paper's networks; klif-mnist is the network for MNIST, Fashion-MNIST and N-MNIST."""


def table_1_network(
    row: str,
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
) -> CodedConvNet:
    """A network of the KLIF paper's Table 1.

    :param row: its name in :data:`TABLE_1`
    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of the image; 2, the polarities, for the frames of an event camera
    :param image_size: height and width in pixels
    :param classes: number of classes
    :param width: factor on the published channels and features

    :raises ValueError: for a width that leaves no channel, or an image too small for its max poolings
    """
    encoder_channels, blocks, hidden = TABLE_1[row]
    return CodedConvNet(
        neuron,
        time_steps,
        in_channels=in_channels,
        image_size=image_size,
        encoder_channels=scaled(encoder_channels, width),
        blocks=[[scaled(channels, width) for channels in block] for block in blocks],
        hidden=scaled(hidden, width),
        classes=classes,
    )


def mnist_network(
    neuron: NeuronFactory,
    time_steps: int = 8,
    *,
    width: float = 1.0,
    in_channels: int = 1,
    image_size: int = 28,
    classes: int = 10,
) -> CodedConvNet:
    """``(128C3+128C3+128C3)(enc)-128C3-MP2-2048FC-(100FC-AP10)(dec)``, for MNIST, Fashion-MNIST and N-MNIST.

    See :func:`table_1_network`. ``in_channels`` is 2 for N-MNIST, ``image_size`` 34 for N-MNIST and 8 for
    scikit-learn's digits.
    """
    return table_1_network(
        "klif-mnist",
        neuron,
        time_steps,
        in_channels=in_channels,
        image_size=image_size,
        classes=classes,
        width=width,
    )
