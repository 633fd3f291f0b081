"""The argument block of a launch: ``Call`` in call.h, filled from tensors that are checked, and numbers."""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen.kernel import Kernel
from .layout import Geometry

Tensors = Sequence[Tensor | None]


@dataclass(slots=True)
class Call:
    """What a launch is told; call.h says what each field means. An empty sequence or None is null."""

    geometry: Geometry
    x: Tensor
    parameters: Sequence[Tensor]
    initial: Tensors = ()
    initial_value: Sequence[float] = ()
    spikes: Tensor | None = None
    final: Tensors = ()
    checkpoints: Tensor | None = None
    sequences: Tensors = ()
    grad_spikes: Tensor | None = None
    grad_final: Tensors = ()
    grad_sequences: Tensors = ()
    grad_x: Tensor | None = None
    grad_initial: Tensors = ()
    partial: Tensor | None = None
    grad_parameters: Tensor | None = None
    neighbours: int = 1

    def pack(self, kernel: Kernel, rows: int, threads: int = 1, sums: int = 0) -> bytes:
        """The block: addresses of tensors, and numbers, 8 bytes each, in the order of call.h.

        :raises ValueError: for a tensor of another size, dtype or device than the kernel reads or writes there
        """
        geometry, device, io, real = self.geometry, self.x.device, kernel.dtype, kernel.real
        neurons = geometry.neurons
        values, channels = kernel.steps * neurons, geometry.channels // self.neighbours
        states = len(kernel.program.states)
        none = (0,) * states

        def of(name: str, tensor: Tensor | None, elements: int, dtype: torch.dtype) -> int:
            if tensor is None:
                return 0
            if tensor.numel() != elements or tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"{kernel.program.neuron}: {name}: expected {elements} elements of {dtype} on {device}, got "
                    f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"
                )
            return address(tensor)

        def each(name: str, tensors: Tensors, elements: int) -> Sequence[int]:
            return [of(name, tensor, elements, real) for tensor in tensors] if tensors else none

        parameters = [
            of(p.name, tensor, (kernel.steps if p.per_step else 1) * (channels if p.per_channel else 1), real)
            for p, tensor in zip(kernel.program.parameters, self.parameters, strict=True)
        ] or (0,)
        saved = self.checkpoints.numel() if self.checkpoints is not None else 0
        return _layout(states, len(parameters)).pack(
            of("x", self.x, values, io),
            self.x.stride(0),
            of("spikes", self.spikes, values, io),
            *each("an initial state", self.initial, neurons),
            *(self.initial_value or none),
            *each("a final state", self.final, neurons),
            of("checkpoints", self.checkpoints, saved, real),
            *each("a recorded state", self.sequences, values),
            *parameters,
            of("the gradient of the spikes", self.grad_spikes, values, io),
            self.grad_spikes.stride(0) if self.grad_spikes is not None else 0,
            *each("the gradient of a final state", self.grad_final, neurons),
            *each("the gradient of a recorded state", self.grad_sequences, values),
            of("the gradient of x", self.grad_x, values, io),
            *each("the gradient of an initial state", self.grad_initial, neurons),
            self.partial.data_ptr() if self.partial is not None else 0,
            of("the gradients of the parameters", self.grad_parameters, kernel.grads * channels, real),
            *geometry,
            rows,
            self.neighbours,
            threads,
            sums,
        )

    def neuron_tensors(self) -> list[Tensor]:
        """The tensors that hold values for neurons one after the other, which a vector access may take several of."""
        single = self.x, self.spikes, self.checkpoints, self.grad_spikes, self.grad_x
        of_states = *self.initial, *self.final, *self.sequences
        grads_of_states = *self.grad_final, *self.grad_sequences, *self.grad_initial
        return [tensor for tensor in (*single, *of_states, *grads_of_states) if tensor is not None]


@functools.cache
def _layout(states: int, parameters: int) -> struct.Struct:
    return struct.Struct(f"@3q{states}q{states}d{states}qq{states}q{parameters}q2q{2 * states}qq{states}q9q")


def with_rows(block: bytes, rows: int) -> bytes:
    """The same block with another number in ``rows``, the fourth field from the end."""
    return block[:-32] + rows.to_bytes(8, sys.byteorder) + block[-24:]


_is_shared = getattr(torch._C, "_is_cow_tensor", lambda tensor: False)


def address(tensor: Tensor) -> int:
    """Where a tensor's memory is. ``data_ptr`` would copy memory that is shared until somebody writes to it."""
    if _is_shared(tensor):
        start: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]
        return start + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
