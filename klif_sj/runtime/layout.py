"""How neurons lie in memory: any dense layout is taken as it is, and outputs keep it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Neurons in memory order: ``neuron = (outer * channels + channel) * inner + position``."""

    outer: int
    channels: int
    inner: int

    @property
    def neurons(self) -> int:
        return self.outer * self.channels * self.inner


def dense_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of one time step, with those of dimensions of size 1 made regular; None where there are gaps."""
    regular = list(strides)
    expected = 1
    for dim in sorted(range(len(shape)), key=lambda d: (strides[d], shape[d] != 1, -d)):
        if shape[dim] == 1:
            regular[dim] = expected
        elif strides[dim] != expected:
            return None
        expected *= shape[dim]
    return tuple(regular)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def step_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of one step in a kernel: those of the sequence if its steps are dense, else contiguous ones."""
    step = tuple(shape[1:])
    return dense_strides(step, strides[1:]) or contiguous_strides(step)


def lies_as(shape: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether strides describe the wanted layout of a shape. Strides of dimensions of size 1 do not matter."""
    return strides == wanted or all(size == 1 or a == b for size, a, b in zip(shape, strides, wanted, strict=True))


def with_layout(sequence: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A sequence ``[T, N, *]`` whose steps have these strides: the sequence itself if it has them, else a copy.

    The distance between steps may be any: an input that was expanded over time stays one step in memory.
    """
    present = sequence.stride()[1:]
    if present == strides or lies_as(tuple(sequence.shape[1:]), present, strides):
        return sequence
    return empty_sequence(sequence, sequence.shape[0], strides, sequence.dtype).copy_(sequence)


def allocator(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """A function that makes uninitialised tensors of one form."""
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


def empty(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the device of another one."""
    return torch.empty_strided(shape, strides, dtype=dtype, device=like.device, requires_grad=False)


def empty_sequence(like: Tensor, steps: int, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised sequence ``[steps, N, *]`` whose steps have these strides and lie one after the other."""
    shape = tuple(like.shape[1:])
    return empty(like, (steps, *shape), (math.prod(shape), *strides), dtype)


def geometry(shape: tuple[int, ...], strides: tuple[int, ...], channel_dim: int | None) -> Geometry:
    """Where the channels of a step lie. If ``channel_dim`` is None, it has no channels."""
    neurons = math.prod(shape)
    if channel_dim is None or channel_dim >= len(shape):
        return Geometry(1, 1, neurons)
    channels, inner = shape[channel_dim], strides[channel_dim]
    if channels == 1:
        return Geometry(1, 1, neurons)
    return Geometry(neurons // (channels * inner), channels, inner) if neurons else Geometry(0, channels, 1)
