"""What runs a neuron's step on kernels: a base of our neurons, and of those that :func:`klif_sj.fuse` has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import codegen, runtime
from ..codegen import Kind, Program, Sources
from .parameters import PerStep
from .states import NOT_KEPT, State, as_state, state_dtype

EffectiveParameters = dict[str, Tensor | PerStep]

traceable = (lambda forward: forward) if torch.__version__ >= "2.8" else torch._disable_dynamo
"""torch.compile takes a neuron's call into its graph from torch 2.8 on; before, it breaks the graph there."""


def kind_of(name: str, value: Tensor | PerStep, prepared: bool = False) -> Kind:
    """Of an effective parameter: its name, and whether it is per step, per channel, learned, and prepared."""
    per_step = isinstance(value, PerStep)
    tensor = value.values if isinstance(value, PerStep) else value
    gradients = torch.is_grad_enabled() or torch.jit.is_tracing()
    return name, per_step, tensor.ndim > per_step, gradients and tensor.requires_grad, prepared


def attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def channel_run(
    neuron: str, shaped: Mapping[str, Tensor], step: torch.Size, channel_dim: int | None
) -> tuple[int, int]:
    """The first dimension of a step along which parameters differ, and the one after the last.

    :raises ValueError: for a parameter that does not broadcast against a step
    """
    dims = set() if channel_dim is None else {channel_dim}
    for name, tensor in shaped.items():
        offset = len(step) - tensor.ndim
        if offset < 0 or any(size not in (1, step[d + offset]) for d, size in enumerate(tensor.shape)):
            raise ValueError(
                f"{neuron}: parameter {name!r} has shape {tuple(tensor.shape)}, which does not broadcast against a "
                f"step's input of shape {tuple(step)}; expected it to differ along dimensions of the input alone"
            )
        dims |= {d + offset for d, size in enumerate(tensor.shape) if size != 1}
    return min(dims), max(dims) + 1


def spread(tensor: Tensor, ndim: int, start: int, size: tuple[int, ...]) -> Tensor:
    """A parameter that broadcasts against steps of so many dimensions, one value for each along the run: ``[C]``."""
    aligned = tensor.reshape((1,) * (ndim - tensor.ndim) + tuple(tensor.shape))
    return aligned.reshape(aligned.shape[start : start + len(size)]).expand(size).reshape(-1)


def spread_channels(tensor: Tensor, per_step: bool, position: int, size: tuple[int, ...]) -> Tensor:
    """An effective parameter, ``[C]`` or ``[T, C]``, one value for each along a run that its channels are part of."""
    shape = [1] * len(size)
    shape[position] = -1
    steps = tuple(tensor.shape[:per_step])
    return tensor.reshape(*steps, *shape).expand(*steps, *size).flatten(per_step)


class OnKernels:
    """A neuron whose step, which :meth:`_kernel_equations` gives, runs on kernels."""

    def _kernel_equations(self) -> codegen.Equations:
        """The step; the same for all neurons of a class."""
        raise NotImplementedError

    def _run_kernel(
        self, x_seq: Tensor, states: Mapping[str, State], effective: EffectiveParameters, channel_dim: int | None,
        record: bool, keep: bool, sources: Sources | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        """Spikes, final states where they are to be kept, and the states at every step where they are recorded."""
        if not torch.compiler.is_compiling():
            runtime.refuse_transforms()  # before a step is traced, which would fail within them by another error
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
        kinds = tuple(kind_of(name, value, sources is not None) for name, value in effective.items())
        program, names, own, backward = self._kernel_step(tuple(states), dtype, kinds, needs_grad, sources)
        for name in names:
            if name not in values:
                tensor = own[name] if own[name].dtype == dtype else own[name].to(dtype)
                values[name] = tensor.reshape(()) if tensor.numel() == 1 else tensor
            if values[name].device != device:
                raise ValueError(
                    f"{type(self).__name__}: expected parameter {name!r} on the input's device {device}, got "
                    f"{values[name].device}; move the neuron with .to({str(device)!r})"
                )
        shaped = {name: values[name] for name in names if name not in effective and values[name].ndim}
        merged = None
        if shaped:
            along = {n: v for n, v in effective.items() if kind_of(n, v)[2] and n in names}
            start, stop = channel_run(type(self).__name__, shaped, x_seq.shape[1:], channel_dim if along else None)
            size = tuple(x_seq.shape[1 + start : 1 + stop])
            for name, tensor in shaped.items():
                values[name] = spread(tensor, x_seq.ndim - 1, start, size)
            if len(size) > 1:
                for name, value in along.items():
                    values[name] = spread_channels(
                        values[name], isinstance(value, PerStep), (channel_dim or 0) - start, size
                    )
                merged = size
                x_seq = x_seq.flatten(1 + start, stop)
                initial = [state.flatten(start, stop - 1) for state in initial]
            channel_dim = start
        spikes, final, sequences = runtime.run(
            program, x_seq, initial, numbers, [values[n] for n in names], channel_dim, backward, record, keep
        )
        if merged:
            spikes = spikes.unflatten(1 + start, merged)
            final = [state.unflatten(start, merged) for state in final]
            sequences = [sequence.unflatten(1 + start, merged) for sequence in sequences]
        kept, stored = (dict(zip(states, values, strict=True)) if values else {} for values in (final, sequences))
        return spikes, kept, stored

    def _kernel_step(
        self: Any,
        names: tuple[str, ...],
        dtype: torch.dtype,
        kinds: tuple[Kind, ...],
        needs_grad: bool,
        sources: Sources | None,
    ) -> tuple[Program | str, tuple[str, ...], dict[str, Tensor], bool]:
        """This neuron's program for states of these names, its parameters' names, those that are the
        neuron's own, and whether it has a gradient.

        While torch.compile traces, the program is its text.
        """
        if not torch.compiler.is_compiling():
            step = codegen.step_of(self, names, self._kernel_equations(), kinds, dtype, needs_grad, sources)
            own = {**step.tensors, **step.shaped()} if step.prologue else step.tensors
            return step.program, step.program.names, own, step.program.backward is not None
        text, used, paths, computed, settings, backward = self._traced_kernel_step(names, kinds, dtype, needs_grad)
        for path, value in settings:
            # Compared, so that the compiled graph is guarded by the value: a float that is only read would be an input.
            if attribute(self, path) != value:
                raise RuntimeError(f"{path} changed while it was traced")
        own = {name: attribute(self, path) for name, path in paths}
        if computed:
            own |= self._computed_parameters(names, kinds, dtype, needs_grad)
        return text, used, own, backward

    def _computed_parameters(self: Any, names: tuple[str, ...], *of: Any) -> dict[str, Tensor]:
        """What a step computes of its parameters alone, outside of the compiled graph."""
        return codegen.step_of(self, names, self._kernel_equations(), *of).shaped()

    _computed_parameters._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _traced_kernel_step(self: Any, names: tuple[str, ...], *of: Any) -> Any:
        """What :meth:`_kernel_step` needs of a step; torch.compile takes it as a constant."""
        step = codegen.step_of(self, names, self._kernel_equations(), *of)
        program = step.program
        settings = tuple((path, value) for path, value in step.settings)
        paths, computed = dict(step.paths), False
        if step.prologue is not None:
            computed = bool(step.prologue.calls)
            if not computed:
                paths |= {name: step.prologue.paths[number] for name, number in step.prologue.taken.items()}
        return program.text, program.names, tuple(paths.items()), computed, settings, program.backward is not None

    _traced_kernel_step._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script compiles of this neuron: nothing, as of SpikingJelly's."""
        raise RuntimeError(
            f"{type(self).__name__}: expected torch.jit.trace or torch.export, got torch.jit.script, which compiles no "
            "neuron of SpikingJelly: their forward takes any arguments, and their states may be numbers"
        )

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if value is NOT_KEPT:
            raise RuntimeError(
                f"{type(self).__name__}: state {name!r} was not kept, as the neuron was built with keep_state=False; "
                "build it with keep_state=True, or read it at every step with store_v_seq=True"
            )
        return value
