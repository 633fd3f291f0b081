"""The argument block of a launch: ``Call`` in call.h, filled from tensors and numbers."""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

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

    def pack(self, states: int, rows: int, threads: int = 1, sums: int = 0) -> bytes:
        """The block: addresses of tensors, and numbers, 8 bytes each, in the order of call.h."""
        none = (0,) * states
        parameters = [tensor.data_ptr() for tensor in self.parameters] or (0,)
        return _layout(states, len(parameters)).pack(
            self.x.data_ptr(),
            self.x.stride(0),
            self.spikes.data_ptr() if self.spikes is not None else 0,
            *(_addresses(self.initial) if self.initial else none),
            *(self.initial_value or none),
            *(_addresses(self.final) if self.final else none),
            self.checkpoints.data_ptr() if self.checkpoints is not None else 0,
            *(_addresses(self.sequences) if self.sequences else none),
            *parameters,
            self.grad_spikes.data_ptr() if self.grad_spikes is not None else 0,
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


def _addresses(tensors: Tensors) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
