"""Runs a neuron's step on kernels: the base of our neurons, and of those that :func:`klif_sj.fuse` has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import codegen, runtime
from ..codegen import Kind, PerStep, Program, Sources
from .states import NOT_KEPT, State, as_state

traceable = (lambda forward: forward) if torch.__version__ >= "2.8" else torch._disable_dynamo
"""From torch 2.8 on, torch.compile takes a neuron's call into its graph; before, it breaks the graph there."""


def kind_of(name: str, value: Tensor | PerStep, prepared: bool = False) -> Kind:
    """The kind of an effective parameter: its name, and whether it is per step, per channel, learned, and prepared."""
    per_step = isinstance(value, PerStep)
    tensor = value.values if isinstance(value, PerStep) else value
    gradients = torch.is_grad_enabled() or torch.jit.is_tracing()
    return name, per_step, tensor.ndim > per_step, gradients and tensor.requires_grad, prepared


def attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def spread(
    neuron: str, values: dict[str, Tensor], shaped: Sequence[str], along: Sequence[Kind], x_seq: Tensor,
    channel_dim: int | None,
) -> tuple[int, tuple[int, ...]]:  # fmt: skip
    """Give parameters that broadcast against a step one value for each place along the dimensions where they differ.

    :param values: all parameters by name. Those in ``shaped`` have any shape, those of the kinds ``along`` follow
        ``channel_dim``, and both are replaced by ``[C]`` or ``[T, C]``, where C counts the places.
    :return: the first of those dimensions, and the sizes of all of them
    :raises ValueError: for a parameter that does not broadcast against a step
    """
    step = tuple(x_seq.shape[1:])
    dims = {channel_dim} if along and channel_dim is not None else set()
    for name in shaped:
        shape = tuple(values[name].shape)
        offset = len(step) - len(shape)
        if offset < 0 or any(size not in (1, step[d + offset]) for d, size in enumerate(shape)):
            raise ValueError(
                f"{neuron}: parameter {name!r} has shape {shape}, which does not broadcast against a step's input of "
                f"shape {step}; expected it to differ along dimensions of the input alone"
            )
        dims |= {d + offset for d, size in enumerate(shape) if size != 1}
    start, stop = min(dims), max(dims) + 1
    size = step[start:stop]
    for name in shaped:
        tensor = values[name].reshape((1,) * (len(step) - values[name].ndim) + tuple(values[name].shape))
        values[name] = tensor.reshape(tensor.shape[start:stop]).expand(size).reshape(-1)
    for name, per_step, *_ in along if len(size) > 1 else ():
        steps = tuple(values[name].shape[:per_step])
        shape = tuple(-1 if dim == channel_dim else 1 for dim in range(start, stop))
        values[name] = values[name].reshape(*steps, *shape).expand(*steps, *size).flatten(per_step)
    return start, size


class OnKernels:
    """A neuron whose step runs on kernels. :meth:`_kernel_equations` returns the step."""

    def _kernel_equations(self) -> codegen.Equations:
        """Return the step, which is the same for all neurons of a class."""
        raise NotImplementedError

    def _run_kernel(
        self: Any, x_seq: Tensor, dtype: torch.dtype, states: Mapping[str, State], effective: Mapping[str, Tensor],
        kinds: tuple[Kind, ...], channel_dim: int | None, record: bool, keep: bool, sources: Sources | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        """Return spikes, final states if they are kept, and the states at every step if they are recorded.

        :param dtype: the dtype of states and arithmetic
        :param effective: the effective parameters, fitted to the input; ``kinds`` has the kind of each
        :param sources: their sources, if the kernel computes them; ``effective`` then has the neuron's own parameters
        """
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(runtime.NO_TRANSFORMS)  # tracing a step within them would raise another error
        needs_grad = x_seq.requires_grad
        initial: list[Tensor] = []
        numbers: list[float] = []
        for value in states.values():
            if isinstance(value, Tensor):
                initial, numbers = [as_state(value, x_seq[0], dtype) for value in states.values()], []
                break
            numbers.append(float(value))
        for tensor in (*initial, *effective.values()):
            needs_grad = needs_grad or tensor.requires_grad
        key = tuple(states), kinds, dtype, needs_grad and torch.is_grad_enabled()
        program: Program | str
        if torch.compiler.is_compiling():
            program, names, own, learns = self._compiled_step(*key)
        else:
            step, tensors = codegen.step_of(self, self._kernel_equations, *key, sources)
            program, names, learns = step.program, step.program.names, step.program.backward is not None
            own = step.parameters(tensors) if tensors else {}
        values, shaped = dict(effective), []
        for name in names:
            if name not in values:
                tensor = own[name] if own[name].dtype == dtype else own[name].to(dtype)
                if tensor.ndim and tensor.numel() != 1:
                    shaped.append(name)
                values[name] = tensor.reshape(()) if tensor.ndim and tensor.numel() == 1 else tensor
        merged_sizes: tuple[int, ...] = ()
        if shaped:
            along = [kind for kind in kinds if kind[2] and kind[0] in names]
            start, size = spread(type(self).__name__, values, shaped, along, x_seq, channel_dim)
            if len(size) > 1:
                merged_sizes, stop = size, start + len(size)
                x_seq = x_seq.flatten(1 + start, stop)
                initial = [state.flatten(start, stop - 1) for state in initial]
            channel_dim = start
        parameters = []
        for name in names:
            parameters.append(values[name])
        spikes, final, sequences = runtime.run(
            program, x_seq, initial, numbers, parameters, channel_dim, learns, record, keep
        )
        if merged_sizes:
            spikes = spikes.unflatten(1 + start, merged_sizes)
            final = [state.unflatten(start, merged_sizes) for state in final]
            sequences = [sequence.unflatten(1 + start, merged_sizes) for sequence in sequences]
        updated = dict(zip(states, final, strict=True)) if final else {}
        return spikes, updated, dict(zip(states, sequences, strict=True)) if sequences else {}

    def _compiled_step(
        self: Any, names: tuple[str, ...], kinds: tuple[Kind, ...], dtype: torch.dtype, needs_grad: bool
    ) -> tuple[str, tuple[str, ...], dict[str, Tensor], bool]:
        """The step while torch.compile traces: the program as text, the names of its parameters, the neuron's own
        parameters by name, and whether the program has a gradient.
        """
        text, used, paths, computed, settings, backward = self._traced_kernel_step(names, kinds, dtype, needs_grad)
        for path, value in settings:
            # The comparison guards the compiled graph by the value. A float that is only read would become an input.
            if attribute(self, path) != value:
                raise RuntimeError(f"{path} changed while it was traced")
        own = {name: attribute(self, path) for name, path in paths}
        if computed:
            own |= self._computed_parameters(names, kinds, dtype, needs_grad)
        return text, used, own, backward

    def _computed_parameters(self: Any, names: tuple[str, ...], *key: Any) -> dict[str, Tensor]:
        """The step's parameters, computed outside of the compiled graph from the neuron's tensors."""
        step, tensors = codegen.step_of(self, self._kernel_equations, names, *key)
        return step.parameters(tensors)

    _computed_parameters._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _traced_kernel_step(self: Any, names: tuple[str, ...], *key: Any) -> Any:
        """What :meth:`_compiled_step` needs to know of a step. torch.compile takes it as a constant."""
        step, _ = codegen.step_of(self, self._kernel_equations, names, *key)
        program = step.program
        settings = tuple((path, value) for path, value in step.settings)
        paths, computed = {name: step.own[position] for name, position in step.taken.items()}, False
        if step.prologue is not None:
            computed = bool(step.prologue.calls)
            if not computed:
                paths |= {name: step.prologue.paths[number] for name, number in step.prologue.taken.items()}
        return program.text, program.names, tuple(paths.items()), computed, settings, program.backward is not None

    _traced_kernel_step._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which cannot compile SpikingJelly's neurons either."""
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
