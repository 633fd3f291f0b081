"""FusedNode: a SpikingJelly neuron written once, as charge, fire and reset, and run by any backend."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from .. import _compat, codegen, runtime
from .._checks import DTYPES, check_bool, check_input, check_number, check_threshold
from ..codegen import Effective, EffectiveParameters, Program
from .on_kernels import OnKernels, kind_of, traceable
from .parameters import channel_view, fit_to_input, soft_reset_depth, unless_changed
from .states import NOT_KEPT, NUMBERS, State, as_state, fit_state, state_dtype


@dataclass(slots=True)  # it is no tuple, because torch.export compares a module's tuples before and after
class _Sequence:
    """What a call leaves to the next one, which may continue its sequence."""

    left: tuple[Tensor, ...] = ()
    parameters: EffectiveParameters = field(default_factory=dict)
    trace: Any = None
    """The trace of torch.jit that the call was a part of."""

    def goes_on_from(self, states: Mapping[str, State]) -> bool:
        """Whether these states, from which a call starts, are those that were left, and still have a graph."""
        same = len(self.left) == len(states) and all(map(operator.is_, self.left, states.values()))
        return same and torch.is_grad_enabled() and any(state.requires_grad for state in self.left)


def _one_step(node: FusedNode, x: Tensor) -> Tensor:
    """One step of a neuron, or of a stand-in for it."""
    return node.one_step(x)


def _effective(node: FusedNode) -> EffectiveParameters:
    """The effective parameters of a neuron, or of a stand-in for it."""
    return node.effective_parameters()


_NOTHING_LEFT = _Sequence()


def _time_step(memories: Mapping[str, Any]) -> int:
    """How many single steps there have been. torch.compile would otherwise take the number for a constant."""
    if not torch.compiler.is_compiling():
        return memories["time_step"]
    with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
        return int(memories["time_step"])


class FusedNode(OnKernels, _compat.BaseNode):
    r"""Base of neurons whose kernels are generated from their equations.

    One time step is

    .. math::
        H[t] = \text{charge}(X[t], \text{states}[t-1]), \quad
        S[t] = \text{fire}(H[t]), \quad
        \text{states}[t] = \text{reset}(H[t], S[t])

    A subclass writes :meth:`neuronal_charge`, and :meth:`neuronal_fire` and :meth:`neuronal_reset` where it differs
    from an integrate-and-fire neuron, in plain torch on ``self.v``. Single-step and multi-step mode, every backend,
    gradients and states follow from those.

    :param v_threshold: threshold :math:`V_{th}`; with ``math.inf`` the neuron never fires and only integrates
    :param v_reset: potential after a spike (hard reset), or None to subtract the threshold instead (soft reset)
    :param surrogate_function: any SpikingJelly surrogate; None makes a new ``ATan(alpha=2)`` for this neuron
    :param detach_reset: whether the gradient through the reset's spike is cut
    :param step_mode: ``'s'``, input ``[N, *]``, or ``'m'``, input ``[T, N, *]``
    :param backend: ``'auto'``, ``'torch'``, ``'cpp'`` or ``'cupy'``. ``'auto'`` takes ``'cupy'`` for CUDA tensors where
        CuPy imports, ``'cpp'`` for CPU tensors where a C++ compiler is found, else ``'torch'``.
    :param store_v_seq: keep every state at every time step, as ``v_seq`` (and ``NAME_seq`` of the other states)
    :param keep_state: False does not keep the final states of multi-step calls, so they cannot be read, and every call
        starts from the reset values, as in training that resets after every batch

    Dtypes: float16, bfloat16, float32 and float64 in, the same out. States and arithmetic are float32 (float64 for
    float64 input), in every backend.

    States that a call has left start again from their reset values when the input's shape, device or state dtype
    changes. A state that is given (``node.v = ...``, a reset value, an explicit state of SpikingJelly 2) is broadcast
    to a step and converted to its dtype.

    :raises TypeError: for an input that is no floating-point tensor
    :raises ValueError: for an input without a batch dimension or without a time step, or on a device that the named
        backend does not serve; for a state that was given and cannot be broadcast to a step. The states are as before
        the call.
    """

    states: ClassVar[tuple[str, ...]] = ("v",)
    """Names of the states that a step carries to the next. The ones beyond ``v`` start at zero."""

    time_dependent: ClassVar[bool] = False
    """Whether effective parameters may be :class:`PerStep`; in single-step mode ``time_step`` then counts the steps."""

    gate_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that :func:`klif_sj.parameter_groups` trains at a fraction of the learning rate."""

    channel_dim: int = 1
    """The dimension of a single step's input that effective parameters of shape ``[C]`` follow."""

    v: Tensor
    """The membrane potential."""

    effective: Effective
    """The effective parameters of the step under way, shaped to broadcast against x; only set within a step."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        keep_state: bool = True,
    ) -> None:
        _compat.init_base_node(
            self,
            check_threshold(v_threshold),
            None if v_reset is None else check_number("v_reset", v_reset),
            surrogate.ATan(alpha=2.0) if surrogate_function is None else surrogate_function,
            check_bool("detach_reset", detach_reset),
            step_mode,
        )
        for name in self.states[1:]:
            self.register_memory(name, 0.0)
        if self.time_dependent:
            self.register_memory("time_step", 0)
        self.backend = backend
        self.store_v_seq = check_bool("store_v_seq", store_v_seq)
        self.keep_state = check_bool("keep_state", keep_state)
        self._sequence = _NOTHING_LEFT

    def effective_parameters(self) -> EffectiveParameters:
        """Effective parameters by name, computed from the raw ones once per forward; steps read ``self.effective``.

        Each is a tensor, scalar or ``[C]``, or a :class:`PerStep` of ``[T]`` or ``[T, C]``. Scalar parameters that a
        step uses as they are need no entry here.
        """
        return {}

    def neuronal_charge(self, x: Tensor) -> None:
        """Charge ``self.v`` with the input current x."""
        raise NotImplementedError(f"{type(self).__name__} must define neuronal_charge(self, x)")

    def neuronal_fire(self) -> Tensor:
        """The spike, ``S = Θ(v - v_threshold)``."""
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        """Reset ``self.v`` where it fired: to ``v_reset``, or down by ``v_threshold`` where ``v_reset`` is None."""
        if self.detach_reset:
            spike = spike.detach()
        if self.v_reset is None:
            self.v = self.v - spike * soft_reset_depth(self.v_threshold)
        else:
            self.v = (1.0 - spike) * self.v + spike * self.v_reset

    def _kernel_equations(self) -> codegen.Equations:
        return _one_step

    def _kernel_computation(self) -> codegen.Computation:
        return _effective

    def one_step(self, x: Tensor) -> Tensor:
        """One time step: sets the states, and returns the spike.

        The torch backend runs it on the neuron itself. To make a kernel of it, it runs on a stand-in for the neuron.
        """
        self.neuronal_charge(x)
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike

    @traceable
    def single_step_forward(self, x: Tensor) -> Tensor:
        """Advance by one step: x ``[N, *]``, the spike ``[N, *]``."""
        check_input(x, "s", type(self).__name__)
        if not self.keep_state:
            raise ValueError(
                f"{type(self).__name__}: expected step_mode 'm' with keep_state=False, which starts every call from "
                "the reset values; build the neuron with keep_state=True for single steps"
            )
        backend = runtime.serving_backend(self._backend, x)
        states, memories = self._states_for(x.shape, x)
        step = _time_step(memories) if self.time_dependent else 0
        spikes, updated, sequences = self._run(backend, x.unsqueeze(0), states, step)
        self._memories.update(updated)
        if self.time_dependent:
            self._memories["time_step"] = step + 1
        for name, sequence in sequences.items():
            self._append_sequence(name, sequence)
        return spikes[0]

    @traceable
    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """Advance by T steps: x_seq ``[T, N, *]``, the spikes ``[T, N, *]``."""
        check_input(x_seq, "m", type(self).__name__)
        backend = runtime.serving_backend(self._backend, x_seq)
        states, _ = self._states_for(x_seq.shape[1:], x_seq)
        spikes, updated, sequences = self._run(backend, x_seq, states, 0, self.keep_state)
        self._memories.update(updated if self.keep_state else dict.fromkeys(self.states, NOT_KEPT))
        if self.time_dependent:
            self._memories["time_step"] = 0
        for name, sequence in sequences.items():
            setattr(self, f"{name}_seq", sequence)
        return spikes

    def _run(
        self, backend: str, x_seq: Tensor, states: Mapping[str, State], first_step: int, keep: bool = True
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return spikes, final states if they are kept, and the states at every step if they are stored."""
        if backend == "torch":
            parameters = self._effective_outside(states)
            spikes, updated, sequences = self._run_torch(x_seq, states, parameters, first_step, keep)
        else:
            spikes, updated, sequences, parameters = self._run_kernel(
                x_seq, states, first_step, self.channel_dim, self._store_v_seq, keep
            )
        # Setting an attribute of an nn.Module takes far longer.
        trace = None if torch.compiler.is_compiling() else torch._C._get_tracing_state()
        self.__dict__["_sequence"] = _Sequence((*updated.values(),), parameters, trace) if updated else _NOTHING_LEFT
        return spikes, updated, sequences

    def program(self, dtype: torch.dtype = torch.float32, backward: bool = True) -> Program:
        """One time step of this neuron in C, forward and backward, for an arithmetic's dtype.

        :raises klif_sj.codegen.StepTraceError: naming what no kernel can express and the line that it came from
        """
        sources, parameters = codegen.sources_of(self, _effective, dtype) or (None, self.effective_parameters())
        kinds = tuple(kind_of(name, value, sources is not None) for name, value in parameters.items())
        step, _ = codegen.step_of(self, self._kernel_equations, self.states, kinds, dtype, backward, sources)
        return step.program

    def cuda_source(self, T: int, dtype: torch.dtype = torch.float32) -> str:
        """The CUDA C++ that this neuron is trained with, generated from its equations, for T steps of a dtype."""
        if not isinstance(T, int) or T < 1:
            raise ValueError(f"T: expected a number of time steps, at least 1, got {T!r}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        return runtime.cuda_source(self.program(state_dtype(dtype)), T, dtype)

    def _effective_outside(self, states: Mapping[str, State]) -> EffectiveParameters:
        """The effective parameters of a call that starts from these states.

        If it continues from the states that the previous call left, it takes that call's bounded parameters, unless
        their raw values have changed. The rule for a value at its bound then judges the gradient of the whole sequence.
        """
        parameters, previous = self.effective_parameters(), self._sequence
        if previous.parameters and not torch.compiler.is_compiling() and previous.goes_on_from(states):
            return {name: unless_changed(previous.parameters.get(name), value) for name, value in parameters.items()}
        return parameters

    def _run_torch(
        self, x_seq: Tensor, states: Mapping[str, State], parameters: EffectiveParameters, first_step: int, keep: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        memories, dtype = self._memories, state_dtype(x_seq.dtype)
        effective, kinds = fit_to_input(type(self).__name__, parameters, x_seq, first_step, self.channel_dim, dtype)
        # The backward of unbind stacks once, whereas that of x_seq[t] would write a sequence of zeros for every step.
        steps = runtime.as_it_is_now(x_seq).unbind(0)
        views = {
            name: [channel_view(v, steps[0], self.channel_dim) for v in effective[name].unbind(0)]
            if per_step
            else channel_view(effective[name], steps[0], self.channel_dim)
            for name, per_step, *_ in kinds
        }
        spikes, history = [], []
        saved = {name: memories[name] for name in self.states}
        memories.update({name: as_state(value, steps[0], dtype) for name, value in states.items()})
        try:
            for t, x in enumerate(steps):
                self.effective = Effective({n: v[t] if isinstance(v, list) else v for n, v in views.items()})
                spikes.append(self.one_step(x.to(dtype)).to(x_seq.dtype))
                if self.store_v_seq:
                    history.append({name: memories[name] for name in self.states})
            final = {name: memories[name] for name in self.states} if keep else {}
        finally:
            memories.update(saved)
            if "effective" in self.__dict__:
                del self.effective
        sequences = {name: torch.stack([h[name] for h in history]) for name in self.states} if history else {}
        return torch.stack(spikes), final, sequences

    def _states_for(self, shape: torch.Size, x: Tensor) -> tuple[dict[str, State], Mapping[str, Any]]:
        """The states to start from, for a step of this shape, and the memories that they are from.

        If a call with an input of another shape, device or state dtype has left the states, all start again from
        their reset values. A state that was given is fitted to the step.

        :raises ValueError: for a state that was given and cannot be broadcast to the step, or is on another device
        """
        memories = self._memories
        for name in self.states:
            if isinstance(memories[name], Tensor) and self._is_left_by_another(memories[name], shape, x):
                memories = self._memories_rv
                break
        states = {}
        for name in self.states:
            value = self._memories_rv[name] if memories[name] is NOT_KEPT else memories[name]
            if not isinstance(value, (int, float)):
                value = fit_state(type(self).__name__, name, value, shape, x.device, state_dtype(x.dtype))
            states[name] = value
        return states, memories

    def _is_left_by_another(self, state: Tensor, shape: torch.Size, x: Tensor) -> bool:
        """Whether a state was left by a call with another kind of input, or by another trace of torch.jit."""
        compiling = torch.compiler.is_compiling()
        trace = None if compiling else torch._C._get_tracing_state()
        if trace is not None and trace is not self._sequence.trace and state.requires_grad:
            return True
        was_left = compiling or any(state is left for left in self._sequence.left)
        return was_left and (state.shape, state.device, state.dtype) != (shape, x.device, state_dtype(x.dtype))

    # These methods are the functional interface of SpikingJelly 2. The old line never calls them.

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """The states given by the caller, as tensors that fit the input.

        :raises ValueError: for a state that cannot be broadcast to a step of the input, or is on another device
        """
        check_input(inputs[0], step_mode, type(self).__name__)
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        dtype, neuron = state_dtype(x.dtype), type(self).__name__
        tensors = []
        for name, state in zip(self.states, states, strict=False):
            value = self._memories_rv[name] if state is NOT_KEPT else state
            tensors.append(as_state(fit_state(neuron, name, value, x.shape, x.device, dtype), x, dtype))
        return (*tensors, *states[len(self.states) :])

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """One step from explicit states, in the order of :meth:`named_memories`: ``((spike,), new states)``."""
        step = states[-1] if self.time_dependent else 0
        backend = runtime.serving_backend(self.backend, inputs[0])
        fitted = self._given_states(inputs[0].shape, inputs[0], states)
        spikes, updated, _ = self._run(backend, inputs[0].unsqueeze(0), fitted, step)
        return (spikes[0],), (*updated.values(), *((step + 1,) if self.time_dependent else ()))

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """T steps from explicit states: ``((spikes,), new states)``."""
        backend = runtime.serving_backend(self.backend, inputs[0])
        fitted = self._given_states(inputs[0].shape[1:], inputs[0], states)
        spikes, updated, _ = self._run(backend, inputs[0], fitted, 0)
        return (spikes,), (*updated.values(), *((0,) if self.time_dependent else ()))

    def _given_states(self, shape: torch.Size, x: Tensor, states: tuple[Any, ...]) -> dict[str, State]:
        neuron, dtype = type(self).__name__, state_dtype(x.dtype)
        return {
            name: fit_state(neuron, name, state, shape, x.device, dtype)
            for name, state in zip(self.states, states, strict=False)
        }

    # SpikingJelly's own tools expect these of a neuron.

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """``'auto'`` and the backends that can serve on this machine."""
        return runtime.supported_backends()

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        runtime.require_backend(value)
        self._backend = value

    @property
    def store_v_seq(self) -> bool:
        return self._store_v_seq

    @store_v_seq.setter
    def store_v_seq(self, value: bool) -> None:
        self._store_v_seq = value
        self._forget_sequences()

    def reset(self) -> None:
        """Put every state back to its reset value and forget the stored sequences."""
        if NUMBERS.issuperset(map(type, self._memories_rv.values())):
            self._memories.update(self._memories_rv)
        else:
            super().reset()
        if self._store_v_seq:
            self._forget_sequences()
        self.__dict__["_sequence"] = _NOTHING_LEFT

    def detach(self) -> None:
        """Cut the states from the graph. A returned spike may also be a state, so nothing is detached in place."""
        self._change_states(Tensor.detach)
        for name in self._sequence_names():
            sequence = getattr(self, name)
            if sequence is not None:
                setattr(self, name, sequence.detach())

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        """Move or convert the neuron. States that a call has left still count as left by that call."""
        memories, left = dict(self._memories), self._sequence.left
        result = super()._apply(*arguments, **options)
        moved = (self._memories[name] for name, value in memories.items() if any(value is state for state in left))
        self.__dict__["_sequence"] = _Sequence(tuple(moved))
        return result

    def _change_states(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the states, both in the memories and in the record of what a call has left."""
        changed = {id(v): change(v) for v in self._memories.values() if isinstance(v, Tensor)}
        for name, value in self._memories.items():
            self._memories[name] = changed.get(id(value), value)
        left = tuple(changed[id(state)] for state in self._sequence.left if id(state) in changed)
        self.__dict__["_sequence"] = _Sequence(left)

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}, "
            f"step_mode={self.step_mode}, backend={self.backend}"
        )

    def _append_sequence(self, name: str, step: Tensor) -> None:
        """Append a single step to a stored sequence, which starts again if the shape, dtype or device has changed."""
        attribute = f"{name}_seq"
        past = getattr(self, attribute)
        if past is not None and (past.shape[1:], past.dtype, past.device) == (step.shape[1:], step.dtype, step.device):
            step = torch.cat((past, step))
        setattr(self, attribute, step)

    def _sequence_names(self) -> Iterable[str]:
        return (f"{name}_seq" for name in self.states)

    def _forget_sequences(self) -> None:
        for name in self._sequence_names():
            if self.__dict__.get(name, self) is not None:
                setattr(self, name, None)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take of the neuron: the states lose their graph, which cannot be copied."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _memories=dict(self._memories))
        twin.detach()
        twin.__dict__.pop("_compiled_call_impl", None)  # a copy would run the original
        return twin.__dict__
