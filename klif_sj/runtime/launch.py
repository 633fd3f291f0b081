"""A launch: a kernel, and the record that tells it where its tensors are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..codegen.call import Layout, layout_of
from ..codegen.kernel import Kernel
from .layout import Geometry


class Pass:
    """A kernel, and the record that every launch of it copies and completes with addresses.

    :param geometry: the neurons as the kernel counts them
    :param channels: how many channels the parameters have
    :param device: where the tensors are
    """

    def __init__(self, kernel: Kernel, geometry: Geometry, channels: int, device: torch.device) -> None:
        self.kernel, self.geometry, self.channels, self.device = kernel, geometry, channels, device
        self.layout: Layout = layout_of(len(kernel.program.states), len(kernel.program.parameters))
        self.record: list[Any] = [0] * self.layout.size
        at = self.layout.at
        self.record[at.x_stride] = self.record[at.grad_spikes_stride] = geometry.neurons
        self.record[at.outer], self.record[at.channels], self.record[at.inner] = geometry
        self.record[at.channel_repeat] = geometry.channels // channels
        self.sums: tuple[int, ...] = (kernel.grads * channels,)
        """The shape of the kernel's sums: those of a lone gradient in its shape, others one after the other."""
        self._sizes: list[int] = []
        self._reshaped: list[tuple[int, tuple[int, ...], bool]] = []  # which, its shape, whether over channels
        for position, p in enumerate(kernel.program.learned):
            shape = (*(kernel.steps,) * p.per_step, *(channels,) * p.per_channel)
            size = (kernel.steps if p.per_step else 1) * channels
            self._sizes.append(size)
            if len(shape) != 1 or size != shape[0]:
                self._reshaped.append((position, shape, size != math.prod(shape)))
        self._is_one = len(self._sizes) == 1 and not any(over_channels for *_, over_channels in self._reshaped)
        if self._is_one:
            self.sums = self._reshaped[0][1] if self._reshaped else self.sums

    def parameter_gradients(self, sums: Tensor) -> list[Tensor]:
        """The sums as gradients in the shapes of the learned parameters, whose memory they share."""
        if self._is_one:
            return [sums]
        gradients = list(sums.unsafe_split_with_sizes(self._sizes))  # no views: the sums themselves are not used
        for position, shape, over_channels in self._reshaped:
            if over_channels:
                gradients[position] = gradients[position].view(-1, self.channels).sum(1)
            gradients[position] = gradients[position].view(shape)
        return gradients


PLAIN = {Tensor, torch.nn.Parameter}
"""The types of tensors that have their own memory, and operators that no subclass defines."""

_is_shared = getattr(torch._C, "_is_cow_tensor", lambda tensor: False)


def address(tensor: Tensor) -> int:
    """The address of a tensor's memory. ``data_ptr`` would first copy memory that is shared by copy-on-write."""
    # torch 2.15 does not answer for a subclass of Tensor in Python; a tensor that is shared here never is one.
    if type(tensor) in PLAIN and _is_shared(tensor):
        start: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]
        return start + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
