"""The arguments of a launch: one table of fields defines both the C struct and the packed record."""

from __future__ import annotations

import functools
import operator
import struct
from types import SimpleNamespace
from typing import NamedTuple


class Field(NamedTuple):
    """A field of the record: a value of 8 bytes, or an array of such values.

    :param type: the type in C
    :param each: the constant that says how many elements an array has; empty for a single value
    :param by_neuron: whether the field points to values of neurons that lie one after the other, so that a vector
        access may take several of them
    """

    name: str
    type: str
    meaning: str
    each: str = ""
    by_neuron: bool = False

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")


FIELDS = (
    Field("x", "const io *", "[T, neurons]", by_neuron=True),
    Field("x_stride", "int64 ", "elements from one time step to the next"),
    Field("spikes", "io *", "[T, neurons]", by_neuron=True),
    Field("initial", "const real *", "[neurons], or null: initial_value", "STATES", by_neuron=True),
    Field("initial_value", "double ", "of every neuron", "STATES"),
    Field("final", "real *", "[neurons], or null: not wanted", "STATES", by_neuron=True),
    Field("checkpoints", "real *", "[SEGMENTS - 1, STATES, neurons]: where segments start", by_neuron=True),
    Field("sequences", "real *", "[T, neurons], with RECORD", "STATES", by_neuron=True),
    Field("parameters", "const real *", "each scalar, [channels], [T] or [T, channels]", "PARAMETERS"),
    Field("prepared", "real *", "what the step takes in place of those that are PREPARED"),
    Field("grad_spikes", "const io *", "[T, neurons]", by_neuron=True),
    Field("grad_spikes_stride", "int64 ", "elements from one time step to the next"),
    Field("grad_final", "const real *", "[neurons], or null: zero", "STATES", by_neuron=True),
    Field("grad_sequences", "const real *", "[T, neurons], with RECORD", "STATES", by_neuron=True),
    Field("grad_x", "io *", "[T, neurons], or null: not wanted", by_neuron=True),
    Field("grad_initial", "real *", "[neurons], or null: not wanted", "STATES", by_neuron=True),
    Field(
        "partial", "real *", "sums of parameter gradients before the second pass; null on the host, where they are few"
    ),
    Field("grad_parameters", "real *", "[GRADS, channels / channel_repeat]"),
    Field("outer", "int64 ", "neuron = (outer * channels + channel) * inner + position"),
    Field("channels", "int64 ", "see outer"),
    Field("inner", "int64 ", "see outer"),
    Field("rows", "int64 ", "tiles or blocks that one row of partial sums is of"),
    Field("channel_repeat", "int64 ", "with CHANNELS_INNERMOST: so many in a row share parameters, and sums"),
    Field("threads", "int64 ", "on the host"),
    Field("sums", "int64 ", "on the host: how many partial sums there are"),
)


def c_struct() -> str:
    """The definition of ``struct Call`` in C."""
    lines = [
        f"    {field.type}{field.name}{f'[AT_LEAST_ONE({field.each})]' if field.each else ''};  // {field.meaning}\n"
        for field in FIELDS
    ]
    return f"struct Call {{\n{''.join(lines)}}};\n"


class Layout:
    """The layout of a record, which is a list of numbers, for a number of states and of parameters.

    ``at.NAME`` is the position of a field in the record, or the slice of an array. ``by_neuron`` returns a record's
    addresses of values by neuron, and ``in_storage`` says of each address whether its values have the storage dtype
    instead of the arithmetic's.
    """

    def __init__(self, states: int, parameters: int) -> None:
        self.at = SimpleNamespace()
        self.in_storage: list[bool] = []
        by_neuron: list[int] = []
        self.size, formats = 0, []
        for field in FIELDS:
            count = {"": 1, "STATES": states, "PARAMETERS": max(parameters, 1)}[field.each]
            end = self.size + count
            setattr(self.at, field.name, slice(self.size, end) if field.each else self.size)
            if field.by_neuron:
                by_neuron += range(self.size, end)
                self.in_storage += ["io" in field.type] * count
            formats.append(f"{count}{'d' if field.type == 'double ' else 'q'}")
            self.size = end
        self.by_neuron = operator.itemgetter(*by_neuron)
        self.pack = struct.Struct(f"@{''.join(formats)}").pack


@functools.cache
def layout_of(states: int, parameters: int) -> Layout:
    return Layout(states, parameters)
