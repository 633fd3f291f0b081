"""The argument block of a launch: ``Call`` in call.h, filled from tensors and numbers."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .layout import Geometry

Tensors = Sequence[Tensor | None]


@dataclass(slots=True)
class Call:
    """What a launch is told; call.h says what each field means. An empty sequence or None is null."""

    geometry: Geometry
    x: Tensor
    parameters: Tensors
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
    spread: Tensor | None = None

    def pack(self, states: int, rows: int, threads: int = 1) -> bytes:
        """The block: addresses of tensors, and numbers, 8 bytes each, in the order of call.h."""
        none = (0,) * states
        parameters = _addresses(self.parameters, (0,))
        outer, channels, inner = self.geometry
        return _layout(states, len(parameters)).pack(
            self.x.data_ptr(),
            self.x.stride(0),
            _address(self.spikes),
            *_addresses(self.initial, none),
            *(self.initial_value or none),
            *_addresses(self.final, none),
            _address(self.checkpoints),
            *_addresses(self.sequences, none),
            *parameters,
            _address(self.grad_spikes),
            0 if self.grad_spikes is None else self.grad_spikes.stride(0),
            *_addresses(self.grad_final, none),
            *_addresses(self.grad_sequences, none),
            _address(self.grad_x),
            *_addresses(self.grad_initial, none),
            _address(self.partial),
            _address(self.grad_parameters),
            outer,
            channels,
            inner,
            rows,
            self.neighbours,
            _address(self.spread),
            threads,
        )

    def neuron_tensors(self) -> list[Tensor]:
        """The tensors that hold values for neurons one after the other, which a vector access may take several of."""
        found: list[Any] = []
        for field in fields(self):
            if field.name not in _OTHERS:
                value = getattr(self, field.name)
                found += [value] if isinstance(value, Tensor) else value or ()
        return [tensor for tensor in found if tensor is not None]


_OTHERS = ("geometry", "parameters", "initial_value", "partial", "grad_parameters", "neighbours", "spread")


@functools.cache
def _layout(states: int, parameters: int) -> struct.Struct:
    return struct.Struct(f"@3q{states}q{states}d{states}qq{states}q{parameters}q2q{2 * states}qq{states}q9q")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Tensors, none: Sequence[int]) -> Sequence[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors] if tensors else none
