"""The argument block of a launch: ``Call`` in walk.h, filled from tensors and numbers."""

from __future__ import annotations

import functools
import struct
from typing import Any

from torch import Tensor

from .kernel import Kernel

FIELDS: tuple[tuple[str, str], ...] = (
    ("x", "one"), ("x_stride", "one"), ("spikes", "one"), ("initial", "state"), ("initial_value", "value"),
    ("final", "state"), ("checkpoints", "one"), ("sequences", "state"), ("parameters", "parameter"),
    ("grad_spikes", "one"), ("grad_spikes_stride", "one"), ("grad_final", "state"), ("grad_sequences", "state"),
    ("grad_x", "one"), ("grad_initial", "state"), ("partial", "one"), ("grad_parameters", "one"),
    ("outer", "one"), ("channels", "one"), ("inner", "one"), ("rows", "one"), ("threads", "one"),
)  # fmt: skip
"""The fields in order, and what each has one value for."""

NEURON_FIELDS = ("x", "spikes", "initial", "final", "checkpoints", "sequences", "grad_spikes", "grad_final",
                 "grad_sequences", "grad_x", "grad_initial")  # fmt: skip
"""Those whose tensors hold a value for every neuron."""


def pack(kernel: Kernel, arguments: dict[str, Any]) -> bytes:
    """Addresses of tensors, and numbers, 8 bytes each. What is missing is null."""
    packing, counts = _packing(len(kernel.program.states), len(kernel.program.parameters))
    values: list[Any] = []
    for name, kind in FIELDS:
        given = arguments.get(name)
        items = [given] if kind == "one" else list(given or ())
        numbers = [item.data_ptr() if isinstance(item, Tensor) else item or 0 for item in items]
        values += numbers + [0] * (counts[kind] - len(numbers))
    return packing.pack(*values)


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors that hold a value for every neuron."""
    found = []
    for name in NEURON_FIELDS:
        given = arguments.get(name)
        found += [t for t in (given if isinstance(given, list) else [given]) if isinstance(t, Tensor)]
    return found


@functools.lru_cache(maxsize=256)
def _packing(states: int, parameters: int) -> tuple[struct.Struct, dict[str, int]]:
    counts = {"one": 1, "state": states, "value": states, "parameter": max(parameters, 1)}
    layout = "".join(f"{counts[kind]}{'d' if kind == 'value' else 'q'}" for _, kind in FIELDS)
    return struct.Struct(f"@{layout}"), counts
