"""What a launch needs to know that depends on shapes alone."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen.kernel import Kernel
from ..codegen.program import Program
from .layout import Geometry, contiguous_strides, geometry, step_strides, with_layout

COLUMN_LIMIT = 32
"""Channels with fewer neurons than this in a row are laid side by side instead (the ``columns`` schedule)."""


@dataclass(frozen=True)
class Plan:
    """A kernel, and how it goes over a sequence.

    :param shape: of one step
    :param strides: of the neurons of one step, in which the kernel works
    :param geometry: the neurons as the kernel counts them
    :param channels: of the parameters
    :param neighbours: neurons in a row that share a channel, where the kernel takes every neuron for a channel
    """

    kernel: Kernel
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    geometry: Geometry
    channels: int
    neighbours: int

    def state(self, tensor: Tensor | None) -> Tensor | None:
        """A state, or the gradient of one, in the kernel's layout.

        :raises ValueError: for another shape than a step's
        """
        if tensor is None:
            return None
        if tensor.shape != self.shape:
            raise ValueError(
                f"{self.kernel.program.neuron}: expected a state of shape {self.shape}, got {tuple(tensor.shape)}"
            )
        return with_layout(tensor.unsqueeze(0), self.strides).squeeze(0)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the learned parameters, and so of their gradients."""
        return tuple(
            (*(self.kernel.steps,) * p.per_step, *(self.channels,) * p.per_channel) for p in self.kernel.program.learned
        )

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all gradients have the same shape, and are the kernel's sums as they are."""
        size = self.kernel.grads * self.channels
        return len(set(self.shapes)) == 1 and size == math.prod(self.shapes[0]) * len(self.shapes)

    @functools.cached_property
    def sums(self) -> tuple[int, ...]:
        """The shape in which the kernel's sums ``[grads, channels]`` are the least work to tell apart."""
        if not self.alike:
            return self.kernel.grads, self.channels
        return self.shapes[0] if len(self.shapes) == 1 else (len(self.shapes), *self.shapes[0])

    def parameter_gradients(self, sums: Tensor) -> list[Tensor]:
        """The sums as gradients in the shapes of the learned parameters, which may share their memory."""
        if self.alike:
            return [sums] if len(self.shapes) == 1 else list(sums.unbind(0))
        gradients, start = [], 0
        for shape, parameter in zip(self.shapes, self.kernel.program.learned, strict=True):
            rows = self.kernel.steps if parameter.per_step else 1
            if parameter.per_channel or self.channels == 1:
                gradient = sums.as_strided(shape, contiguous_strides(shape), start)
            else:
                gradient = sums[start // self.channels :][:rows].sum(1).view(shape)
            gradients.append(gradient)
            start += rows * self.channels
        return gradients


def plan_of(program: Program, x_seq: Tensor, channel_dim: int | None, record: bool, *, backward: bool) -> Plan:
    """The plan for a program and a sequence ``[T, N, *]``."""
    return _planned(program, x_seq.shape, x_seq.stride(), x_seq.dtype, channel_dim, record, backward)


@functools.lru_cache(maxsize=4096)
def _planned(
    program: Program, sizes: torch.Size, x_strides: tuple[int, ...], dtype: torch.dtype, channel_dim: int | None,
    record: bool, backward: bool,
) -> Plan:  # fmt: skip
    shape = tuple(sizes)
    strides = step_strides(shape, x_strides)
    per_channel = any(p.per_channel for p in program.parameters)
    laid = geometry(shape[1:], strides, channel_dim if per_channel else None)
    columns = laid.channels > 1 and laid.inner < COLUMN_LIMIT
    return Plan(
        kernel=Kernel(program, shape[0], dtype, columns, record, backward),
        shape=shape[1:],
        strides=strides,
        geometry=Geometry(laid.outer, laid.channels * laid.inner, 1) if columns else laid,
        channels=laid.channels,
        neighbours=laid.inner if columns else 1,
    )
