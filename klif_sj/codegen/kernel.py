"""The complete source of a multi-step kernel: a program's step inside the templates."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import torch

from .call import c_struct
from .program import Parameter, Program

STORAGE = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}


@dataclass(frozen=True)
class Kernel:
    """All that a kernel is compiled for: a program, the number of time steps, the storage dtype and the schedule.

    ``channels_innermost`` says that neighbouring neurons have different channels, as in channels-last images and in
    ``[T, N, C]``. Otherwise runs of neighbouring neurons share a channel.
    """

    program: Program
    steps: int
    dtype: torch.dtype
    channels_innermost: bool
    record: bool
    backward: bool

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """The hash, computed once, because every call looks the kernel up in several caches."""
        return hash((self.program, self.steps, self.dtype, self.channels_innermost, self.record, self.backward))

    @functools.cached_property
    def real(self) -> torch.dtype:
        """The dtype of states and arithmetic."""
        dtype: torch.dtype = getattr(torch, self.program.dtype)
        return dtype

    @property
    def summed_grads(self) -> int:
        """The number of learned parameters whose gradient is one sum over all time steps."""
        return sum(not p.per_step for p in self.program.learned) if self.backward else 0

    @property
    def per_step_grads(self) -> int:
        """The number of learned parameters with a gradient for each time step."""
        return sum(p.per_step for p in self.program.learned) if self.backward else 0

    @functools.cached_property
    def grads(self) -> int:
        return self.summed_grads + self.per_step_grads * self.steps

    @functools.cached_property
    def values_of_channel(self) -> int:
        """The number of values that the parameters have for each channel, over all steps."""
        return sum(self.steps if p.per_step else 1 for p in self.program.parameters if p.per_channel)

    def prepared_values(self, channels: int) -> int:
        """The number of values that the kernel computes from the neuron's own parameters before the first step."""
        return sum(
            (self.steps if p.per_step else 1) * (channels if p.per_channel else 1)
            for p in self.program.parameters
            if p.prepared
        )

    def source(self, target: str, **constants: int) -> str:
        """The C++ source for ``target``, ``'cpu.cpp'`` or ``'cuda.cu'``, with constants that only this target has."""
        on_host = target == "cpu.cpp"
        program = self.program
        parts = [self._header(), template("prelude.h"), self._constants(constants)]
        if self.backward and on_host:
            parts += [
                _STEP_KEEPING.format(program.forward_keeping or program.forward),
                _STEP_BACKWARD_OF_KEPT.format(program.backward_of_kept or program.backward),
            ]
        else:
            parts += [_STEP.format(program.forward), *([_STEP_BACKWARD.format(program.backward)] * self.backward)]
        parts.append(_PREPARED.format(program.prepare, program.prepare_back))
        call = template("call.h").replace("CALL\n", c_struct())
        return "\n".join([*parts, call, *([] if on_host else [template("walk.h")]), template(target)])

    def _header(self) -> str:
        program = self.program
        parameters = ", ".join(_describe(p) for p in program.parameters) or "none"
        return (
            f"// {program.neuron}\n"
            "// One time step below is generated from its neuronal_charge, neuronal_fire and neuronal_reset; comments\n"
            "// are the lines of Python that the statements under them came from.\n"
            f"// states: {', '.join(program.states)}    parameters: {parameters}\n"
            f"// T = {self.steps}, {STORAGE[self.dtype]} in and out, arithmetic in {program.dtype}\n"
        )

    def _constants(self, constants: dict[str, int]) -> str:
        program = self.program
        values = {
            "T": self.steps,
            "STATES": len(program.states),
            "PARAMETERS": len(program.parameters),
            "SUMMED": self.summed_grads,
            "BY_STEP": self.per_step_grads,
            **constants,
        }
        masks = {
            "PER_STEP": sum(p.per_step << i for i, p in enumerate(program.parameters)),
            "PER_CHANNEL": sum(p.per_channel << i for i, p in enumerate(program.parameters)),
            "PREPARED": sum(p.prepared << i for i, p in enumerate(program.parameters)),
        }
        flags = {"CHANNELS_INNERMOST": self.channels_innermost, "RECORD": self.record}
        return "\n".join(
            [
                f"#define BACKWARD {int(self.backward)}",
                f"typedef {'double' if program.dtype == 'float64' else 'float'} real;",
                f"typedef {STORAGE[self.dtype]} io;",
                *(f"constexpr int {name} = {value};" for name, value in values.items()),
                *(f"constexpr unsigned long long {name} = {value}ull;" for name, value in masks.items()),
                *(f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()),
                "",
            ]
        )


_STEP = """\
// x: the input current. state: in, before the step; out, after it. p: this step's effective parameters.
// output: the spike.
INLINE void step(const real x, real (&state)[STATES], const real *p, real &output) {{
{}
}}
"""
_STEP_KEEPING = """\
// x: the input current. state: in, before the step; out, after it. p: this step's effective parameters.
// output: the spike. kept: out, what step_backward need not compute again.
INLINE void step(const real x, real (&state)[STATES], const real *p, real &output, real *kept) {{
{}
}}
"""
_STEP_BACKWARD = """\
// The step's vector-Jacobian product. grad_state: in, of the states after the step; out, before it. sum_p: adds to the
// sums of the parameters' gradients.
INLINE void step_backward(const real x, const real (&state)[STATES], const real *p,
                          const real grad_output, real (&grad_state)[STATES], real *sum_p,
                          real &grad_x) {{
{}
}}
"""
_STEP_BACKWARD_OF_KEPT = """\
// The step's vector-Jacobian product. grad_state: in, of the states after the step; out, before it. sum_p: adds to the
// sums of the parameters' gradients.
INLINE void step_backward(const real x, const real (&state)[STATES], const real *p, const real *kept,
                          const real grad_output, real (&grad_state)[STATES], real *sum_p,
                          real &grad_x) {{
{}
}}
"""


_PREPARED = """\
// Parameter j as the step takes it, from the neuron's own; and the gradient of the neuron's own.
INLINE real prepared(int j, const real own) {{
    switch (j) {{
{}    default: return own;
    }}
}}
INLINE real prepared_back(int j, const real own, const real grad) {{
    switch (j) {{
{}    default: return grad;
    }}
}}
"""


def _describe(parameter: Parameter) -> str:
    axes = [axis for axis, has in (("T", parameter.per_step), ("C", parameter.per_channel)) if has]
    return f"{parameter.name} [{', '.join(axes)}]{' (learned)' if parameter.learned else ''}"


@functools.cache
def template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text()
