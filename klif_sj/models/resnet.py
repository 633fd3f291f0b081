"""Spiking residual networks for small images: those of the KLIF paper's ablation, of CLIF and of GLIF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

from spikingjelly.activation_based import layer
from torch import nn

from ..coding import ConvEncoder, NeuronFactory, make_neuron
from .blocks import (
    ResidualBlock,
    convolution,
    encoder_notation,
    he_initialise,
    klif_head,
    linear_readout,
    normalisation,
    scaled,
    sequence,
)
from .spiking_network import SpikingNetwork

__all__ = ["preact_resnet18", "resnet18", "resnet18_glif", "resnet19"]

Stage = tuple[int, int, int]
"""The channels, the number of blocks, and the stride of the first block."""

RESNET18: Sequence[Stage] = ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2))
RESNET18_GLIF: Sequence[Stage] = ((64, 2, 1), (128, 2, 1), (256, 2, 2), (512, 2, 2))
RESNET19: Sequence[Stage] = ((128, 3, 1), (256, 3, 2), (512, 2, 2))

MakeBlock = Callable[[NeuronFactory, int, int, int], ResidualBlock]
"""Makes a residual block from the neuron, the channels in, the channels out and the stride."""


def basic_block(neuron: NeuronFactory, in_channels: int, channels: int, stride: int) -> ResidualBlock:
    """ResNet's block, with normalised convolutions; a shortcut that changes shape is a normalised 1x1 convolution."""
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = sequence(conv=convolution(in_channels, channels, 1, stride), norm=normalisation(channels))
    body = sequence(
        conv1=convolution(in_channels, channels, stride=stride),
        norm1=normalisation(channels),
        neuron=make_neuron(neuron, channels),
        conv2=convolution(channels, channels),
        norm2=normalisation(channels),
    )
    return ResidualBlock(body, make_neuron(neuron, channels), shortcut)


def preact_block(neuron: NeuronFactory, in_channels: int, channels: int, stride: int) -> ResidualBlock:
    """The CLIF authors' pre-activation block, cut so that it maps the spikes of one activation to those of the next.

    The authors' block begins with a normalisation and neurons, whose spikes go to the shortcut as well. Here these two
    are the end of the block before, and the first two are the end of the encoder. The network is the same, and the
    encoder computes the current of a static image only once.
    """
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = convolution(in_channels, channels, 1, stride)
    body = sequence(
        conv1=convolution(in_channels, channels, stride=stride),
        norm=normalisation(channels),
        neuron=make_neuron(neuron, channels),
        conv2=convolution(channels, channels),
    )
    return ResidualBlock(body, make_neuron(neuron, channels), shortcut, normalisation(channels))


def threshold_block(neuron: NeuronFactory, in_channels: int, channels: int, stride: int) -> ResidualBlock:
    """GLIF's block, with threshold-dependent normalisation (tdBN), also of a shortcut that keeps the shape.

    tdBN normalises to the threshold of the neurons that follow. The two branches of a sum get half the variance each.
    """
    inner, joint = make_neuron(neuron, channels), make_neuron(neuron, channels)
    branch = initial_threshold(joint) / math.sqrt(2)
    shortcut: dict[str, nn.Module] = {}
    if stride != 1 or in_channels != channels:
        shortcut["conv"] = convolution(in_channels, channels, 1, stride)
    shortcut["norm"] = normalisation(channels, branch)
    body = sequence(
        conv1=convolution(in_channels, channels, stride=stride),
        norm1=normalisation(channels, initial_threshold(inner)),
        neuron=inner,
        conv2=convolution(channels, channels),
        norm2=normalisation(channels, branch),
    )
    return ResidualBlock(body, joint, sequence(**shortcut))


def initial_threshold(neuron: nn.Module) -> float:
    """The threshold with which a neuron starts. GLIF, which learns its threshold, has it as ``init_v_threshold``.

    :raises TypeError: for a neuron without such a number
    """
    threshold = getattr(neuron, "init_v_threshold", getattr(neuron, "v_threshold", None))
    if not isinstance(threshold, Real):
        raise TypeError(
            "threshold-dependent normalisation: expected a neuron with a number as v_threshold or init_v_threshold, "
            f"got {type(neuron).__name__} with {threshold!r}"
        )
    return float(threshold)


def residual_network(
    make_block: MakeBlock,
    stages: Sequence[Stage],
    encoder: ConvEncoder,
    neuron: NeuronFactory,
    head: Mapping[str, nn.Module],
    head_notation: str,
    input_shape: tuple[int, int, int],
) -> SpikingNetwork:
    """A network of an encoder, stages of residual blocks, an average over the image, and a head."""
    layers: dict[str, nn.Module] = {"encoder": encoder}
    notation = [encoder_notation(encoder)]
    in_channels = encoder.norm.num_features
    for channels, blocks, stride in stages:
        for number in range(blocks):
            block_stride = stride if number == 0 else 1
            layers[f"block{len(layers)}"] = make_block(neuron, in_channels, channels, block_stride)
            notation.append(f"{channels}R" + (f"/{block_stride}" if block_stride > 1 else ""))
            in_channels = channels
    layers["average"] = layer.AdaptiveAvgPool2d(1, step_mode="m")
    layers["flatten"] = layer.Flatten(step_mode="m")
    network = SpikingNetwork({**layers, **head}, input_shape, "-".join((*notation, "GAP", head_notation)))
    he_initialise(network)
    return network


def scaled_stages(stages: Sequence[Stage], width: float) -> list[Stage]:
    return [(scaled(channels, width), blocks, stride) for channels, blocks, stride in stages]


def resnet18(
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
    coding: bool = False,
) -> SpikingNetwork:
    """The ResNet-18 of the KLIF paper's ablation, with or without its coding layers.

    It has a 3x3 convolution of 64 channels, four stages of two blocks with 64, 128, 256 and 512 channels, an average
    over the image, dropout, and a fully connected layer. With coding layers, three parallel convolutions replace the
    first one, and the last layer has ten neurons for each class, which vote. Without, the last layer is linear and has
    no neurons.

    The paper names the architecture only. These details are our choice; see docs/networks.md.

    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of the image
    :param image_size: height and width in pixels
    :param classes: number of classes
    :param width: factor on the published channels
    :param coding: whether it has the KLIF paper's encoder and decoder

    :raises ValueError: for a width that leaves no channel

    Source: arXiv 2302.09238, Sec. 3.2 and Table 3; He et al., CVPR 2016.
    """
    stages = scaled_stages(RESNET18, width)
    encoder = ConvEncoder(in_channels, stages[0][0], neuron, time_steps, convolutions=3 if coding else 1)
    head, notation = klif_head(stages[-1][0], classes, neuron, coding)
    input_shape = (in_channels, image_size, image_size)
    return residual_network(basic_block, stages, encoder, neuron, head, notation, input_shape)


def preact_resnet18(
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
) -> SpikingNetwork:
    """The pre-activation ResNet-18 with which CLIF is reported on CIFAR; parameters as those of :func:`resnet18`.

    Source: Huang et al., ICML 2024, and the authors' code (``spiking_resnet18``); He et al., ECCV 2016.
    """
    stages = scaled_stages(RESNET18, width)
    encoder = ConvEncoder(in_channels, stages[0][0], neuron, time_steps, convolutions=1)
    head = {"readout": linear_readout(stages[-1][0], classes)}
    input_shape = (in_channels, image_size, image_size)
    return residual_network(preact_block, stages, encoder, neuron, head, f"{classes}L", input_shape)


def resnet18_glif(
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
) -> SpikingNetwork:
    """The ResNet-18 with which GLIF is reported on CIFAR; parameters as those of :func:`resnet19`.

    It halves the image twice, not three times as other ResNets-18 do: its second stage has stride 1.

    Source: Yao et al., NeurIPS 2022, and the authors' code (``ResNet_18_stand_CW``).
    """
    return threshold_resnet(RESNET18_GLIF, neuron, time_steps, (in_channels, image_size, image_size), classes, width)


def resnet19(
    neuron: NeuronFactory,
    time_steps: int,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: float = 1.0,
) -> SpikingNetwork:
    """The ResNet-19 of tdBN, with which GLIF is reported on CIFAR.

    It has a 3x3 convolution of 128 channels; three, three and two blocks with 128, 256 and 512 channels; an average
    over the image; and for up to 50 classes two linear layers, of 256 and ``classes`` features. For more classes it has
    only the second of these layers. They have no neurons and no bias. Normalisation depends on the threshold of the
    neuron (tdBN).

    :param neuron: class or factory of the neuron, which has a number as ``v_threshold`` or ``init_v_threshold``
    :param time_steps: T, how often a static image is shown
    :param in_channels: channels of the image
    :param image_size: height and width in pixels
    :param classes: number of classes
    :param width: factor on the published channels and features

    :raises ValueError: for a width that leaves no channel
    :raises TypeError: for a neuron without a number as its threshold

    Source: Yao et al., NeurIPS 2022, and the authors' code (``ResNet_19_cifar_CW``); Zheng et al., AAAI 2021.
    """
    return threshold_resnet(RESNET19, neuron, time_steps, (in_channels, image_size, image_size), classes, width)


def threshold_resnet(
    published: Sequence[Stage],
    neuron: NeuronFactory,
    time_steps: int,
    input_shape: tuple[int, int, int],
    classes: int,
    width: float,
) -> SpikingNetwork:
    """A ResNet with threshold-dependent normalisation, as both of GLIF's networks are."""
    stages = scaled_stages(published, width)
    encoder = ConvEncoder(input_shape[0], stages[0][0], neuron, time_steps, convolutions=1)
    nn.init.constant_(encoder.norm.weight, initial_threshold(encoder.neuron))
    features, head, notation = stages[-1][0], {}, f"{classes}L"
    if classes <= 50:
        hidden = scaled(256, width)
        head["linear"] = linear_readout(features, hidden, bias=False, std=0.01)
        features, notation = hidden, f"{hidden}L-{notation}"
    head["readout"] = linear_readout(features, classes, bias=False, std=0.01)
    return residual_network(threshold_block, stages, encoder, neuron, head, notation, input_shape)
