"""What runs a neuron's step on kernels: a base of our neurons, and of those that :func:`klif_sj.fuse` has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import codegen, runtime
from ..codegen import Kind, Program
from .parameters import PerStep
from .states import NOT_KEPT, State, as_state, state_dtype

EffectiveParameters = dict[str, Tensor | PerStep]

traceable = (lambda forward: forward) if torch.__version__ >= "2.8" else torch.compiler.disable
"""torch.compile takes a neuron's call into its graph from torch 2.8 on; before, it breaks the graph there."""


def kind_of(name: str, value: Tensor | PerStep) -> Kind:
    """Of an effective parameter: its name, and whether it is per step, per channel and learned."""
    per_step = isinstance(value, PerStep)
    tensor = value.values if isinstance(value, PerStep) else value
    gradients = torch.is_grad_enabled() or torch.jit.is_tracing()
    return name, per_step, tensor.ndim > per_step, gradients and tensor.requires_grad


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


class OnKernels:
    """A neuron whose step, which :meth:`_kernel_equations` gives, runs on kernels."""

    def _kernel_equations(self) -> codegen.Equations:
        """The step; the same for all neurons of a class."""
        raise NotImplementedError

    def _run_kernel(
        self, x_seq: Tensor, states: Mapping[str, State], effective: EffectiveParameters, channel_dim: int | None,
        record: bool, keep: bool,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        """Spikes, final states where they are to be kept, and the states at every step where they are recorded."""
        dtype, device = state_dtype(x_seq.dtype), x_seq.device
        initial: list[Tensor] = []
        numbers: list[float] = []
        if any(isinstance(value, Tensor) for value in states.values()):
            initial = [as_state(value, x_seq[0], dtype) for value in states.values()]
        else:
            numbers = [float(value) for value in states.values()]
        values = {name: v.values if isinstance(v, PerStep) else v for name, v in effective.items()}
        needs_grad = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x_seq, *initial, *values.values())
        )
        kinds = tuple(kind_of(name, value) for name, value in effective.items())
        program, names, own, backward = self._kernel_step(tuple(states), dtype, kinds, needs_grad)
        parameters = []
        for name in names:
            tensor = values[name] if name in values else own[name].to(dtype).reshape(())
            if tensor.device != device:
                raise ValueError(
                    f"{type(self).__name__}: expected parameter {name!r} on the input's device {device}, got "
                    f"{tensor.device}; move the neuron with .to({str(device)!r})"
                )
            parameters.append(tensor)
        spikes, final, sequences = runtime.run(
            program, x_seq, initial, numbers, parameters, channel_dim, backward, record, keep
        )
        kept, stored = (dict(zip(states, values, strict=True)) if values else {} for values in (final, sequences))
        return spikes, kept, stored

    def _kernel_step(
        self: Any, names: tuple[str, ...], dtype: torch.dtype, kinds: tuple[Kind, ...], needs_grad: bool
    ) -> tuple[Program | str, tuple[str, ...], dict[str, Tensor], bool]:
        """This neuron's program for states of these names, its parameters' names, those that are the
        neuron's own, and whether it has a gradient.

        While torch.compile traces, the program is its text.
        """
        if not torch.compiler.is_compiling():
            step = codegen.step_of(self, names, self._kernel_equations(), kinds, dtype, needs_grad)
            return step.program, step.program.names, step.tensors, step.program.backward is not None
        text, used, paths, settings, backward = self._traced_kernel_step(names, kinds, dtype, needs_grad)
        for path, value in settings:
            # Compared, so that the compiled graph is guarded by the value: a float that is only read would be an input.
            if _attribute(self, path) != value:
                raise RuntimeError(f"{path} changed while it was traced")
        return text, used, {name: _attribute(self, path) for name, path in paths}, backward

    def _traced_kernel_step(self: Any, names: tuple[str, ...], *of: Any) -> Any:
        """What :meth:`_kernel_step` needs of a step; torch.compile takes it as a constant."""
        step = codegen.step_of(self, names, self._kernel_equations(), *of)
        program = step.program
        settings = tuple((path, value) for path, value in step.settings)
        return program.text, program.names, tuple(step.paths.items()), settings, program.backward is not None

    _traced_kernel_step._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if value is NOT_KEPT:
            raise RuntimeError(
                f"{type(self).__name__}: state {name!r} was not kept, as the neuron was built with keep_state=False; "
                "build it with keep_state=True, or read it at every step with store_v_seq=True"
            )
        return value
