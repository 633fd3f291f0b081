"""The class of all networks here: layers in a row, from an image or frames to an output per class and time step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["SpikingNetwork"]


class SpikingNetwork(nn.Sequential):
    """A spiking network that classifies images or sequences of frames.

    Its layers run one after the other, all in multi-step mode. The first layer takes a static image or frames. For an
    image, the first convolution and normalisation are computed once, and the current is repeated for T time steps. Of
    several frames, each time step takes one. The last layer gives an output for each class at each time step
    (:meth:`outputs_by_step`). The network's answer is the mean of these outputs over time.

    The neurons keep their states from call to call, as in every SpikingJelly network: reset them after each batch.
    Neurons with ``keep_state=False`` start every call from their reset values.

    :param layers: the layers by name, from input to output
    :param input_shape: channels, height and width of an image or a frame
    :param notation: the network as a line of text; see docs/networks.md

    Shape: images ``[N, C, H, W]`` or frames ``[T, N, C, H, W]`` to ``[N, classes]``.

    :raises ValueError: for an input of any other shape
    """

    def __init__(self, layers: Mapping[str, nn.Module], input_shape: tuple[int, int, int], notation: str) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.input_shape = input_shape
        self.notation = notation

    def outputs_by_step(self, x: Tensor) -> Tensor:
        """The output for each class at each time step, ``[T, N, classes]``."""
        if x.ndim not in (4, 5) or tuple(x.shape[-3:]) != self.input_shape:
            sizes = ", ".join(map(str, self.input_shape))
            raise ValueError(f"expected images [N, {sizes}] or frames [T, N, {sizes}], got shape {tuple(x.shape)}")
        for layer in self:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs_by_step(x).mean(0)
