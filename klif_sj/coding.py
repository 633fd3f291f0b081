"""The coding layers of the KLIF paper: an image becomes spikes, and spikes become a vote for each class.

Both take any neuron, as a class or a factory; see :data:`NeuronFactory`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

__all__ = ["ConvEncoder", "NeuronFactory", "VotingDecoder", "make_neuron"]

NeuronFactory = Callable[..., nn.Module]
"""Makes the spiking neuron of one layer: a class such as ``KLIFNode`` or any function that returns a neuron.

It is called without arguments. If it takes a parameter named ``channels``, as a neuron with parameters for each channel
does, it gets the number of the layer's channels, or of its features after a fully connected layer.
"""


def make_neuron(factory: NeuronFactory, channels: int) -> nn.Module:
    """A multi-step neuron for a layer of ``channels`` channels.

    torch's random generator is left as it was, even if the neuron draws initial values. So the weights of the layers
    that follow do not depend on the choice of the neuron.
    """
    arguments = {"channels": channels} if "channels" in inspect.signature(factory).parameters else {}
    with torch.random.fork_rng(devices=[]):
        neuron = factory(**arguments)
    functional.set_step_mode(neuron, "m")
    return neuron


class ConvEncoder(nn.Module):
    r"""The KLIF paper's encoder: three parallel 3x3 convolutions, summed, batch-normalised, then spiking neurons.

    .. math::
        S = \mathrm{neuron}\bigl(\mathrm{BN}(W_1 * I + W_2 * I + W_3 * I)\bigr)

    With one convolution it is the usual first layer of a spiking network, which the paper compares with.

    A static image I drives the neurons with the same current at every time step, so the convolutions and the
    normalisation run once and the current is repeated over time without a copy. Frames of an event camera pass through
    them step by step.

    The paper does not say whether the normalisation comes before or after the sum; here it comes after.

    :param in_channels: channels of the image
    :param out_channels: channels of each convolution, hence of the spikes
    :param neuron: class or factory of the neuron
    :param time_steps: T, how often a static image is repeated
    :param convolutions: number of parallel convolutions

    Shape: image ``[N, C, H, W]`` or frames ``[T, N, C, H, W]`` to spikes ``[T, N, out_channels, H, W]``.

    :raises ValueError: for an input with any other number of dimensions, or time_steps or convolutions below 1

    Source: arXiv 2302.09238, Sec. 2.4 and Fig. 3.
    """

    def __init__(
        self, in_channels: int, out_channels: int, neuron: NeuronFactory, time_steps: int, convolutions: int = 3
    ) -> None:
        super().__init__()
        for name, number in (("time_steps", time_steps), ("convolutions", convolutions)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number!r}")
        self.time_steps = time_steps
        # The normalisation that follows subtracts any bias again.
        self.convolutions = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False) for _ in range(convolutions)
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.neuron = make_neuron(neuron, out_channels)

    def current(self, image: Tensor) -> Tensor:
        """The input current of the neurons, ``[N, out_channels, H, W]``, for an image ``[N, C, H, W]``."""
        first, *others = (convolution(image) for convolution in self.convolutions)
        return self.norm(sum(others, start=first))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            current = self.current(x).expand(self.time_steps, -1, -1, -1, -1)
        elif x.ndim == 5:
            current = functional.seq_to_ann_forward(x, self.current)
        else:
            raise ValueError(
                f"ConvEncoder: expected an image [N, C, H, W] or frames [T, N, C, H, W], got shape {tuple(x.shape)}"
            )
        return self.neuron(current)

    def extra_repr(self) -> str:
        return f"time_steps={self.time_steps}"


class VotingDecoder(nn.Module):
    r"""The KLIF paper's decoder: a fully connected layer with a population of neurons for each class, which vote.

    .. math::
        y_c = \frac{1}{T\,P} \sum_{t=1}^{T} \sum_{p=1}^{P} S_{cP+p}[t]

    y is the mean firing rate of each class's population, in [0, 1]; the highest wins. With ten neurons a class this is
    the ``FC-AP10`` of the paper's Table 1.

    :param in_features: features of the incoming spikes
    :param classes: number of classes
    :param neuron: class or factory of the neuron
    :param population: P, the number of neurons for each class

    Shape: spikes ``[T, N, in_features]`` to firing rates ``[N, classes]``.

    Source: arXiv 2302.09238, Sec. 2.4, Fig. 3 and Table 1.
    """

    def __init__(self, in_features: int, classes: int, neuron: NeuronFactory, population: int = 10) -> None:
        super().__init__()
        self.population = population
        self.linear = layer.Linear(in_features, classes * population, bias=False, step_mode="m")
        self.neuron = make_neuron(neuron, classes * population)
        self.vote = layer.VotingLayer(population, step_mode="m")

    def rates_by_step(self, spikes: Tensor) -> Tensor:
        """The share of each class's population that fires at each time step, ``[T, N, classes]``."""
        return self.vote(self.neuron(self.linear(spikes)))

    def forward(self, spikes: Tensor) -> Tensor:
        return self.rates_by_step(spikes).mean(0)
