"""Runs a neuron's step on kernels: the base of our neurons, and of those that :func:`klif_sj.fuse` has changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import codegen, runtime
from ..codegen import EffectiveParameters, Kind, NeuronStep, PerStep, Program, Sources
from .parameters import fit_to_input
from .states import NOT_KEPT, State, as_state, state_dtype

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


class _Plan(NamedTuple):
    """How a call runs again. It can as long as only values change: of x, of states and of parameters.

    Without plans, a call would look up its step and its kernel by all that decides about them, and a layer's forward
    and backward pass would take up to half as long again on the host (GLIF).

    :param sources: returns the tensors from which the kernel computes effective parameters, or None if that computation
        has changed. It is None itself if the kernel computes none.
    :param step: returns the tensors that the step reads, or None if a setting has changed
    :param effective: the names, then the types of the effective parameters that are computed outside of the kernel
    :param order: where the kernel's parameters are among all these: the sources, effective ones, those of the step
    """

    sources: codegen.Find | None
    step: codegen.Find
    effective: tuple[Any, ...]
    order: tuple[int, ...]
    call: runtime.Call

    def run(
        self, node: OnKernels, x_seq: Tensor, initial: Sequence[Tensor], effective: EffectiveParameters
    ) -> runtime.Results | None:
        """Run the call again; None if more than values has changed."""
        own = () if self.sources is None else self.sources(node)
        read = self.step(node)
        if own is None or read is None or (*effective, *map(type, effective.values())) != self.effective:
            return None
        tensors = *own, *map(_tensor, effective.values()), *read
        return self.call.run_again(x_seq, *initial, *map(tensors.__getitem__, self.order))


def _plan(
    node: OnKernels, sources: Sources | None, step: NeuronStep, effective: EffectiveParameters, call: runtime.Call,
    x_seq: Tensor, initial: Sequence[Tensor], parameters: Sequence[Tensor],
) -> _Plan | None:  # fmt: skip
    """A plan to run a call again; None if a tensor was converted, cut or viewed on its way to the kernel."""
    find = sources.reads.find if sources else None
    own, read = find(node) if find else (), step.reads.find(node)
    if own is None or read is None:
        return None
    tensors = *own, *map(_tensor, effective.values()), *read
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    order = tuple(places.get(id(parameter), -1) for parameter in parameters)
    if sorted(order) != list(range(len(tensors))) or not call.may_run_again(x_seq, *initial, *parameters):
        return None
    return _Plan(find, step.reads.find, (*effective, *map(type, effective.values())), order, call)


_plans: weakref.WeakKeyDictionary[Any, dict[Any, _Plan]] = weakref.WeakKeyDictionary()
_NO_PLANS: dict[Any, _Plan] = {}

MOST_PLANS = 16
"""How many plans a neuron keeps: one for each shape of its input, with gradients and without."""


def _tensor(value: Tensor | PerStep) -> Tensor:
    return value.values if isinstance(value, PerStep) else value


class OnKernels:
    """A neuron whose step runs on kernels. :meth:`_kernel_equations` returns the step."""

    def _kernel_equations(self) -> codegen.Equations:
        """Return the step, which is the same for all neurons of a class."""
        raise NotImplementedError

    def _kernel_computation(self) -> codegen.Computation | None:
        """Return the computation of effective parameters if a kernel is to do it."""
        return None

    def _effective_outside(self, states: Mapping[str, State]) -> EffectiveParameters:
        """The effective parameters of a call that starts from these states, computed outside of the kernel."""
        raise NotImplementedError

    def _run_kernel(
        self: Any, x_seq: Tensor, states: Mapping[str, State], first_step: int, channel_dim: int, record: bool,
        keep: bool,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], EffectiveParameters]:  # fmt: skip
        """Return spikes, final states if they are kept, the states at every step if they are recorded, and the
        effective parameters that were computed outside of the kernel.
        """
        initial: list[Tensor] = []
        numbers: list[float] = []
        for value in states.values():
            if isinstance(value, Tensor):
                dtype = state_dtype(x_seq.dtype)
                initial, numbers = [as_state(value, x_seq[0], dtype) for value in states.values()], []
                break
            numbers.append(float(value) + 0.0)  # this makes 0.0 of -0.0, to which it is equal as a key
        arguments = first_step, channel_dim, record, keep
        effective: EffectiveParameters | None = None
        results, plans, key = None, _NO_PLANS, None
        if type(x_seq) in runtime.PLAIN and not torch.compiler.is_compiling():
            gradients = torch.is_grad_enabled(), x_seq.requires_grad
            key = x_seq.shape, x_seq.dtype, gradients, arguments, *states, *numbers
            plans = _plans.get(self, _NO_PLANS)
        if key in plans:
            plan = plans[key]
            effective = {} if plan.sources else self._effective_outside(states)
            results = plan.run(self, x_seq, initial, effective)
        if results is None or effective is None:
            results, effective, new = self._run_anew(x_seq, states, initial, numbers, effective, *arguments)
            if new is not None and key is not None:
                _plans[self] = {**(plans if len(plans) < MOST_PLANS else {}), key: new}
        spikes, final, sequences = results
        updated = dict(zip(states, final, strict=True)) if final else {}
        return spikes, updated, dict(zip(states, sequences, strict=True)) if sequences else {}, effective

    def _run_anew(
        self: Any, x_seq: Tensor, states: Mapping[str, State], initial: Sequence[Tensor], numbers: Sequence[float],
        effective: EffectiveParameters | None, first_step: int, channel_dim: int, record: bool, keep: bool,
    ) -> tuple[runtime.Results, EffectiveParameters, _Plan | None]:  # fmt: skip
        """Run a call without a plan, and return its results, the effective parameters that were computed outside of the
        kernel, and a plan if the call leaves one.

        :param effective: the effective parameters if they have been computed for this call
        """
        compiling, dtype, sources = torch.compiler.is_compiling(), state_dtype(x_seq.dtype), None
        if not compiling and torch._C._are_functorch_transforms_active():
            raise RuntimeError(runtime.NO_TRANSFORMS)  # tracing a step within them would raise another error
        computation = None if compiling else self._kernel_computation()
        if computation is not None:
            sources, own = codegen.sources_of(self, computation, dtype) or (None, {})
        outside = {} if sources else effective or self._effective_outside(states)
        values, kinds = fit_to_input(
            type(self).__name__, own if sources else outside, x_seq, first_step, channel_dim, dtype, sources is not None
        )
        needs_grad = x_seq.requires_grad
        for tensor in (*initial, *values.values()):
            needs_grad = needs_grad or tensor.requires_grad
        of_step = tuple(states), kinds, dtype, needs_grad and torch.is_grad_enabled()
        program: Program | str
        if compiling:
            program, names, more, learns = self._compiled_step(*of_step)
        else:
            step, read = codegen.step_of(self, self._kernel_equations, *of_step, sources)
            program, names, learns = step.program, step.program.names, step.program.backward is not None
            more = step.parameters(read) if read else {}
        shaped = []
        for name in names:
            if name not in values:
                tensor = more[name] if more[name].dtype == dtype else more[name].to(dtype)
                if tensor.ndim and tensor.numel() != 1:
                    shaped.append(name)
                values[name] = tensor.reshape(()) if tensor.ndim and tensor.numel() == 1 else tensor
        merged_sizes: tuple[int, ...] = ()
        x = x_seq
        if shaped:
            along = [kind for kind in kinds if kind[2] and kind[0] in names]
            start, size = spread(type(self).__name__, values, shaped, along, x_seq, channel_dim)
            if len(size) > 1:
                merged_sizes, stop = size, start + len(size)
                x = x_seq.flatten(1 + start, stop)
                initial = [state.flatten(start, stop - 1) for state in initial]
            channel_dim = start
        parameters = [values[name] for name in names]
        settings, plan = (channel_dim, learns, record, keep), None
        if isinstance(program, str) or torch.jit.is_tracing():
            results = runtime.run(program, x, initial, numbers, parameters, *settings)
        else:
            call = runtime.Call(program, numbers, *settings)
            results = call.run(x, *initial, *parameters)
            if x is x_seq:
                plan = _plan(self, sources, step, outside, call, x, initial, parameters)
        if merged_sizes:
            spikes, final, sequences = results
            results = (
                spikes.unflatten(1 + start, merged_sizes),
                [state.unflatten(start, merged_sizes) for state in final],
                [sequence.unflatten(1 + start, merged_sizes) for sequence in sequences],
            )
        return results, outside, plan

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
        settings = tuple(step.reads.constants)
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
