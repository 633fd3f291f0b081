"""The convolutional networks of the KLIF paper's Table 1: encoder, blocks of convolutions, decoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from spikingjelly.activation_based import layer
from torch import nn

from ..coding import ConvEncoder, NeuronFactory, VotingDecoder, make_neuron

__all__ = ["CodedConvNet", "mnist_network"]

DROPOUT = 0.5


class CodedConvNet(nn.Sequential):
    """``(cC3+cC3+cC3)(enc) - [nC3-...-MP2] - ... - hFC - (10 neurons a class FC-AP10)(dec)``.

    nC3 is a 3x3 convolution with n channels, BN and spiking neurons; MP2 a 2x2 max pooling; hFC a fully connected layer
    of h spiking neurons. Dropout (0.5) precedes every fully connected layer. Left open by the paper and chosen here:
    convolutions keep the image's size (padding 1), and no layer has a bias.

    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of the image
    :param image_size: height and width of the image, in pixels
    :param encoder_channels: c
    :param blocks: the channels of each block's convolutions; a block ends in MP2
    :param hidden: h
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
        pooled_size = image_size // 2 ** len(blocks)
        if pooled_size < 1:
            raise ValueError(
                f"image_size: expected at least {2 ** len(blocks)} pixels for {len(blocks)} max poolings, "
                f"got {image_size}"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["encoder"] = ConvEncoder(in_channels, encoder_channels, neuron, time_steps)
        channels, depth = encoder_channels, 0
        for number, block in enumerate(blocks, start=1):
            for width in block:
                depth += 1
                layers[f"conv{depth}"] = spiking_convolution(channels, width, neuron)
                channels = width
            layers[f"pool{number}"] = layer.MaxPool2d(2, 2, step_mode="m")
        layers["flatten"] = layer.Flatten(step_mode="m")
        layers["fc1"] = nn.Sequential(
            OrderedDict(
                dropout=layer.Dropout(DROPOUT, step_mode="m"),
                linear=layer.Linear(channels * pooled_size**2, hidden, bias=False, step_mode="m"),
                neuron=make_neuron(neuron, hidden),
            )
        )
        layers["dropout"] = layer.Dropout(DROPOUT, step_mode="m")
        decoder = VotingDecoder(hidden, classes, neuron)
        layers["decoder"] = decoder
        super().__init__(layers)
        first = f"{encoder_channels}C3"
        self.notation = "-".join(
            (
                f"({first}+{first}+{first})(enc)",
                *(f"{width}C3" if width else "MP2" for block in blocks for width in (*block, 0)),
                f"{hidden}FC",
                f"({classes * decoder.population}FC-AP{decoder.population})(dec)",
            )
        )
        """The network as the paper's Table 1 writes it."""


def spiking_convolution(in_channels: int, out_channels: int, neuron: NeuronFactory) -> nn.Sequential:
    """nC3: a 3x3 convolution, BN and spiking neurons, over a sequence ``[T, N, C, H, W]``."""
    return nn.Sequential(
        OrderedDict(
            conv=layer.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False, step_mode="m"),
            norm=layer.BatchNorm2d(out_channels, step_mode="m"),
            neuron=make_neuron(neuron, out_channels),
        )
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

    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is shown; the paper's is 8
    :param width: factor on the paper's 128 channels and 2048 features
    :param in_channels: channels of the image (2 for N-MNIST's polarities)
    :param image_size: height and width in pixels (8 for scikit-learn's digits, 34 for N-MNIST)
    :param classes: number of classes

    :raises ValueError: for a width that leaves no channel
    """
    channels, hidden = round(128 * width), round(2048 * width)
    if channels < 1:
        raise ValueError(f"width: expected a factor that leaves at least one of 128 channels, got {width!r}")
    return CodedConvNet(
        neuron,
        time_steps,
        in_channels=in_channels,
        image_size=image_size,
        encoder_channels=channels,
        blocks=((channels,),),
        hidden=hidden,
        classes=classes,
    )
