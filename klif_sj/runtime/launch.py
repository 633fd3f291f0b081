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
    prepared: Tensor | None = None
    partial: Tensor | None = None
    grad_parameters: Tensor | None = None
    neighbours: int = 1

    def pack(self, kernel: Kernel, rows: int, threads: int = 1, sums: int = 0) -> bytes:
        """The block: addresses of tensors, and numbers, 8 bytes each, in the order of call.h.

        :raises ValueError: for a tensor of another size, dtype or device than the kernel reads there
        """
        self._check(kernel)
        states = len(kernel.program.states)
        none = (0,) * states
        parameters = [address(tensor) for tensor in self.parameters] or (0,)
        return _layout(states, len(parameters)).pack(
            address(self.x),
            self.x.stride(0),
            self.spikes.data_ptr() if self.spikes is not None else 0,
            *(_addresses(self.initial) if self.initial else none),
            *(self.initial_value or none),
            *(_addresses(self.final) if self.final else none),
            self.checkpoints.data_ptr() if self.checkpoints is not None else 0,
            *(_addresses(self.sequences) if self.sequences else none),
            *parameters,
            self.prepared.data_ptr() if self.prepared is not None else 0,
            address(self.grad_spikes) if self.grad_spikes is not None else 0,
            self.grad_spikes.stride(0) if self.grad_spikes is not None else 0,
            *(_addresses(self.grad_final) if self.grad_final else none),
            *(_addresses(self.grad_sequences) if self.grad_sequences else none),
            self.grad_x.data_ptr() if self.grad_x is not None else 0,
            *(_addresses(self.grad_initial) if self.grad_initial else none),
            self.partial.data_ptr() if self.partial is not None else 0,
            self.grad_parameters.data_ptr() if self.grad_parameters is not None else 0,
            *self.geometry,
            rows,
            self.neighbours,
            threads,
            sums,
        )

    def _check(self, kernel: Kernel) -> None:
        """Every tensor that the kernel reads, before an address is all that is left of it."""
        real, neurons = kernel.real, self.geometry.neurons
        values = kernel.steps * neurons
        read: list[tuple[str, Tensor, int, torch.dtype]] = [("x", self.x, values, kernel.dtype)]
        channels = self.geometry.channels // self.neighbours
        for p, tensor in zip(kernel.program.parameters, self.parameters, strict=True):
            size = (kernel.steps if p.per_step else 1) * (channels if p.per_channel else 1)
            read.append((p.name, tensor, size, real))
        if self.grad_spikes is not None:
            read.append(("the gradient of the spikes", self.grad_spikes, values, kernel.dtype))
        for name, tensors, size in (
            ("an initial state", self.initial, neurons),
            ("the gradient of a final state", self.grad_final, neurons),
            ("the gradient of a recorded state", self.grad_sequences, values),
        ):
            read += [(name, tensor, size, real) for tensor in tensors if tensor is not None]
        device = self.x.device
        for name, tensor, size, dtype in read:
            if tensor.numel() != size or tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"{kernel.program.neuron}: {name}: expected {size} elements of {dtype} on {device}, got "
                    f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"
                )

    def neuron_tensors(self) -> list[Tensor]:
        """The tensors that hold values for neurons one after the other, which a vector access may take several of."""
        single = self.x, self.spikes, self.checkpoints, self.grad_spikes, self.grad_x
        of_states = *self.initial, *self.final, *self.sequences
        grads_of_states = *self.grad_final, *self.grad_sequences, *self.grad_initial
        return [tensor for tensor in (*single, *of_states, *grads_of_states) if tensor is not None]


@functools.cache
def _layout(states: int, parameters: int) -> struct.Struct:
    return struct.Struct(f"@3q{states}q{states}d{states}qq{states}q{parameters}qq2q{2 * states}qq{states}q9q")


def with_rows(block: bytes, rows: int) -> bytes:
    """The same block with another number in ``rows``, the fourth field from the end."""
    return block[:-32] + rows.to_bytes(8, sys.byteorder) + block[-24:]


_is_shared = getattr(torch._C, "_is_cow_tensor", lambda tensor: False)


def address(tensor: Tensor) -> int:
    """Where a tensor's memory is. ``data_ptr`` would copy memory that is shared until somebody writes to it."""
    # torch 2.15 does not say it of a subclass in Python; what is shared here never is one.
    if type(tensor) in (Tensor, torch.nn.Parameter) and _is_shared(tensor):
        start: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]
        return start + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()


def _addresses(tensors: Tensors) -> list[int]:
    return [0 if tensor is None else address(tensor) for tensor in tensors]
