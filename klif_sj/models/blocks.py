"""The networks are built of these parts: convolutions, fully connected layers, residual blocks and readouts.

All parts run in multi-step mode, over sequences ``[T, N, ...]``. Batch normalisation takes its statistics over time and
batch. A convolution or fully connected layer before a normalisation has no bias, as it would be subtracted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import groupby

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .._checks import check_positive
from ..coding import ConvEncoder, NeuronFactory, VotingDecoder, make_neuron

__all__ = [
    "ResidualBlock",
    "VotingReadout",
    "blocks_notation",
    "convolution",
    "convolution_blocks",
    "encoder_notation",
    "he_initialise",
    "klif_head",
    "linear_readout",
    "normalisation",
    "pooled_size",
    "scaled",
    "sequence",
    "spiking_convolution",
    "spiking_linear",
]

DROPOUT = 0.5
"""The rate of the dropout before every fully connected layer of the KLIF paper's networks."""


def scaled(size: int, width: float) -> int:
    """A layer's channels or features for a factor ``width`` on the published ``size``.

    :raises ValueError: if none would be left
    """
    narrowed = round(size * check_positive("width", width))
    if narrowed < 1:
        raise ValueError(f"width: expected a factor that leaves at least one of {size} channels, got {width!r}")
    return narrowed


def sequence(**layers: nn.Module) -> nn.Sequential:
    """The layers one after the other, under their names."""
    return nn.Sequential(OrderedDict(layers))


def convolution(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image's size, divided by its stride."""
    return layer.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False, step_mode="m")


def normalisation(channels: int, scale: float = 1.0) -> nn.BatchNorm2d:
    """Batch normalisation to the initial standard deviation ``scale``."""
    norm = layer.BatchNorm2d(channels, step_mode="m")
    nn.init.constant_(norm.weight, scale)
    return norm


def spiking_convolution(in_channels: int, out_channels: int, neuron: NeuronFactory, dropout: float = 0) -> nn.Module:
    """nC3: a 3x3 convolution, BN and spiking neurons, followed by dropout if its rate is not 0."""
    layers = {
        "conv": convolution(in_channels, out_channels),
        "norm": normalisation(out_channels),
        "neuron": make_neuron(neuron, out_channels),
    }
    return sequence(**layers, **({"dropout": layer.Dropout(dropout, step_mode="m")} if dropout else {}))


def spiking_linear(in_features: int, features: int, neuron: NeuronFactory) -> nn.Module:
    """nFC of the KLIF paper: dropout, a fully connected layer and spiking neurons."""
    linear = layer.Linear(in_features, features, bias=False, step_mode="m")
    spiking_from_the_start(linear)
    return sequence(dropout=layer.Dropout(DROPOUT, step_mode="m"), linear=linear, neuron=make_neuron(neuron, features))


def spiking_from_the_start(linear: nn.Linear) -> None:
    """Give a fully connected layer weights with which its neurons fire: He's normal distribution for the fan-in.

    No normalisation raises the current of this layer. torch's own initial weights have a sixth of this variance, so
    that hardly any neuron fires at first. If none fires, the potential of the next layer is 0, where KLIF's ReLU stops
    all gradients.
    """
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")


def convolution_blocks(
    in_channels: int,
    blocks: Sequence[Sequence[int]],
    neuron: NeuronFactory,
    pooling: type[nn.Module] = layer.MaxPool2d,
    dropout: float = 0,
) -> dict[str, nn.Module]:
    """Blocks of nC3 layers, each block followed by a 2x2 pooling: ``conv1``, ``conv2``, ..., ``pool1``, ...

    :param blocks: for each block, the channels of its convolutions
    """
    layers: dict[str, nn.Module] = {}
    depth = 0
    for number, block in enumerate(blocks, start=1):
        for channels in block:
            depth += 1
            layers[f"conv{depth}"] = spiking_convolution(in_channels, channels, neuron, dropout)
            in_channels = channels
        layers[f"pool{number}"] = pooling(2, 2, step_mode="m")
    return layers


def blocks_notation(blocks: Iterable[Sequence[int]], pooling: str = "MP2") -> list[str]:
    """Blocks as the KLIF paper's Table 1 writes them: ``(256C3-256C3-256C3-MP2)*2``."""
    written = []
    for text, repeats in groupby("-".join((*(f"{channels}C3" for channels in block), pooling)) for block in blocks):
        times = len(list(repeats))
        written.append(f"({text})*{times}" if times > 1 else text)
    return written


def pooled_size(image_size: int, poolings: int) -> int:
    """Height and width of an image after ``poolings`` 2x2 poolings.

    :raises ValueError: for an image too small for them
    """
    if image_size < 2**poolings:
        raise ValueError(
            f"image_size: expected at least {2**poolings} pixels for {poolings} poolings, got {image_size}"
        )
    return image_size // 2**poolings


class ResidualBlock(nn.Module):
    r"""A residual block, whose sum drives spiking neurons.

    .. math::
        S = \mathrm{neuron}\bigl(\mathrm{norm}(\mathrm{body}(x) + \mathrm{shortcut}(x))\bigr)

    The networks differ in where they normalise; ``norm`` and ``shortcut`` are the identity by default.

    Shape: spikes ``[T, N, C, H, W]`` to spikes.
    """

    def __init__(
        self, body: nn.Module, neuron: nn.Module, shortcut: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.norm = nn.Identity() if norm is None else norm
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.norm(self.body(x) + self.shortcut(x)))


class VotingReadout(VotingDecoder):
    """The KLIF paper's decoder, giving the votes of each time step; the network takes their mean.

    Shape: spikes ``[T, N, in_features]`` to ``[T, N, classes]``.
    """

    def forward(self, spikes: Tensor) -> Tensor:
        return self.rates_by_step(spikes)


def klif_head(in_features: int, classes: int, neuron: NeuronFactory, coding: bool) -> tuple[dict[str, nn.Module], str]:
    """The last layers of the KLIF paper's networks, and their notation.

    With coding, dropout and the paper's voting decoder are the last layers; without, dropout and a linear readout.
    """
    dropout = {"dropout": layer.Dropout(DROPOUT, step_mode="m")}
    if not coding:
        return dropout | {"readout": linear_readout(in_features, classes)}, f"{classes}L"
    decoder = VotingReadout(in_features, classes, neuron)
    spiking_from_the_start(decoder.linear)
    return dropout | {"decoder": decoder}, f"({classes * decoder.population}FC-AP{decoder.population})(dec)"


def encoder_notation(encoder: ConvEncoder) -> str:
    """The encoder as Table 1 writes it, ``(128C3+128C3+128C3)(enc)``; with one convolution ``128C3``."""
    channels = f"{encoder.norm.num_features}C3"
    parallel = len(encoder.convolutions)
    return channels if parallel == 1 else f"({'+'.join([channels] * parallel)})(enc)"


def linear_readout(in_features: int, classes: int, *, bias: bool = True, std: float | None = None) -> nn.Linear:
    """nL: a fully connected layer without neurons, whose bias starts at 0.

    :param std: standard deviation of the initial weights; None leaves torch's own initial values
    """
    linear = layer.Linear(in_features, classes, bias=bias, step_mode="m")
    if std is not None:
        nn.init.normal_(linear.weight, std=std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def he_initialise(network: nn.Module) -> None:
    """Give all convolutions initial weights from He's normal distribution for the fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
