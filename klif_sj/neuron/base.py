"""FusedNode: a SpikingJelly neuron written once, as charge, fire and reset, and run by any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from .. import _compat, runtime
from .._checks import DTYPES, check_bool, check_input, check_number
from .memories import PendingMemories
from .parameters import Effective, PerStep, channel_view, fit_to_input
from .states import NUMBERS, State, as_state, state_dtype

EffectiveParameters = dict[str, Tensor | PerStep]

_traceable = (lambda forward: forward) if torch.__version__ >= "2.8" else torch._disable_dynamo
"""torch.compile takes a neuron's call into its graph from torch 2.8 on; before, it breaks the graph there."""


class FusedNode(BaseNode):
    r"""Base of neurons whose kernels are generated from their equations.

    One time step is

    .. math::
        H[t] = \text{charge}(X[t], \text{states}[t-1]), \quad
        S[t] = \text{fire}(H[t]), \quad
        \text{states}[t] = \text{reset}(H[t], S[t])

    A subclass writes :meth:`neuronal_charge`, and :meth:`neuronal_fire` and :meth:`neuronal_reset` where it differs
    from an integrate-and-fire neuron, in plain torch on ``self.v``. Single-step and multi-step mode, every backend,
    gradients and states follow from those.

    :param v_threshold: threshold :math:`V_{th}`
    :param v_reset: potential after a spike (hard reset), or None to subtract the threshold instead (soft reset)
    :param surrogate_function: any SpikingJelly surrogate; None is a fresh ``ATan(alpha=2)`` for this neuron
    :param detach_reset: whether the gradient through the reset's spike is cut
    :param step_mode: ``'s'``, input ``[N, *]``, or ``'m'``, input ``[T, N, *]``
    :param backend: ``'auto'``, ``'torch'``, ``'cpp'`` or ``'cupy'``. ``'auto'`` takes ``'cupy'`` for CUDA tensors where
        CuPy imports, ``'cpp'`` for CPU tensors where a C++ compiler is found, else ``'torch'``.
    :param store_v_seq: keep every state at every time step, as ``v_seq`` (and ``NAME_seq`` of the other states)

    Dtypes: float16, bfloat16, float32 and float64 in, the same out. States and arithmetic are float32 (float64 for
    float64 input), in every backend. States are made anew when the input's shape, device or state dtype changes.

    The states after a large multi-step training call are computed when they are first read; until then, or a reset,
    they keep that call's input in memory. A neuron whose states were read once, be it by its next call, computes them
    at once.

    :raises TypeError: for an input that is no floating-point tensor
    :raises ValueError: for an input without a batch dimension or without a time step, or on a device that the named
        backend does not serve. The states are as before the call.
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
    ) -> None:
        _compat.init_base_node(
            self,
            check_number("v_threshold", v_threshold),
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
        self._sequence: tuple[tuple[Tensor, ...], EffectiveParameters] = ((), {})
        self._states_read = False

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
            self.v = self.v - spike * self.v_threshold
        else:
            self.v = (1.0 - spike) * self.v + spike * self.v_reset

    def advance(
        self, x: Tensor, states: Mapping[str, Tensor], effective: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One time step as a function: the spike and the new states. The node's own states are left alone."""
        memories = self._memories
        held = {name: memories[name] for name in self.states}
        memories.update(states)
        self.effective = Effective(effective)
        try:
            self.neuronal_charge(x)
            spike = self.neuronal_fire()
            self.neuronal_reset(spike)
            return spike, {name: memories[name] for name in self.states}
        finally:
            memories.update(held)
            del self.effective

    @_traceable
    def single_step_forward(self, x: Tensor) -> Tensor:
        """Advance by one step: x ``[N, *]``, the spike ``[N, *]``."""
        check_input(x, "s", type(self).__name__)
        self._settle()
        states, step = self._states_for(x.shape, x)
        spikes, updated, sequences, _ = self._run(x.unsqueeze(0), states, step)
        self._commit(updated, step + 1)
        if self.store_v_seq:
            for name, sequence in sequences.items():
                self._append_sequence(name, sequence)
        return spikes[0]

    @_traceable
    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """Advance by T steps: x_seq ``[T, N, *]``, the spikes ``[T, N, *]``."""
        check_input(x_seq, "m", type(self).__name__)
        self._settle()
        held, _ = self._states_for(x_seq.shape[1:], x_seq)
        pending = self.training and not self._states_read and not torch.compiler.is_compiling()
        spikes, states, sequences, compute = self._run(x_seq, held, 0, pending)
        if compute is not None:
            self.__dict__["_memories"] = PendingMemories(self._memories, states, compute)
        self._commit(states, 0)
        for name, sequence in sequences.items():
            setattr(self, f"{name}_seq", sequence)
        return spikes

    def _run(
        self, x_seq: Tensor, states: dict[str, State], first_step: int, pending: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Callable[[], None] | None]:
        """Spikes, final states, the states at every step where they are stored, and what computes ``pending`` ones."""
        dtype, name = state_dtype(x_seq.dtype), type(self).__name__
        parameters = self._sequence_parameters(states)
        effective = {
            key: fit_to_input(name, key, value, x_seq, first_step, self.channel_dim, dtype)
            for key, value in parameters.items()
        }
        compute = None
        if runtime.serving_backend(self.backend, x_seq) == "torch":
            spikes, updated, sequences = self._run_torch(x_seq, states, effective)
        elif any(isinstance(value, Tensor) for value in states.values()):
            initial = [as_state(value, x_seq[0], dtype) for value in states.values()]
            spikes, updated, sequences, _ = runtime.run(self, x_seq, initial, [], effective)
        else:
            numbers = [float(value) for value in states.values()]
            spikes, updated, sequences, compute = runtime.run(self, x_seq, [], numbers, effective, pending)
        self.__dict__["_sequence"] = (tuple(updated.values()), parameters)  # nn.Module's own way takes far longer
        return spikes, updated, sequences, compute

    def _sequence_parameters(self, states: Mapping[str, State]) -> EffectiveParameters:
        """The effective parameters: those of the previous call where this one goes on from the states that it left.

        So the gradient that reaches a raw parameter is that of the whole sequence, be it one call or single steps: a
        rule that judges it, as KLIF's for a k at its bound, must see all of it. But one that was taken as it is (on
        the CPU a k inside its bounds) is looked at again, as it may have changed.
        """
        left, before = self._sequence
        goes_on = len(left) == len(states) and all(a is b for a, b in zip(left, states.values(), strict=True))
        if not goes_on or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.effective_parameters()
        raw = [name for name, value in before.items() if isinstance(value, nn.Parameter)]
        if not raw:
            return before
        now = self.effective_parameters()
        return before | {name: now[name] for name in raw}

    def cuda_source(self, T: int, dtype: torch.dtype = torch.float32) -> str:
        """The CUDA C++ that this neuron is trained with, generated from its equations, for T steps of a dtype."""
        if not isinstance(T, int) or T < 1:
            raise ValueError(f"T: expected a number of time steps, at least 1, got {T!r}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        return runtime.cuda_source(self, T, dtype)

    def step_program(self, *of: Any) -> Any:
        """This neuron's program for :mod:`klif_sj.runtime`; torch.compile takes it as a constant."""
        return runtime.program_of(self, *of)

    step_program._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _run_torch(
        self, x_seq: Tensor, states: Mapping[str, State], effective: EffectiveParameters
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        dtype = state_dtype(x_seq.dtype)
        # unbind: its backward stacks once, where x_seq[t] would write a whole sequence of zeros for every step.
        steps = x_seq.unbind(0)
        current = {name: as_state(value, steps[0], dtype) for name, value in states.items()}
        views = {
            name: [channel_view(v, steps[0], self.channel_dim) for v in value.values.unbind(0)]
            if isinstance(value, PerStep)
            else channel_view(value, steps[0], self.channel_dim)
            for name, value in effective.items()
        }
        spikes, history = [], []
        for t, x in enumerate(steps):
            step_views = {name: view[t] if isinstance(view, list) else view for name, view in views.items()}
            spike, current = self.advance(x.to(dtype), current, step_views)
            spikes.append(spike.to(x_seq.dtype))
            if self.store_v_seq:
                history.append(current)
        sequences = {name: torch.stack([h[name] for h in history]) for name in self.states} if history else {}
        return torch.stack(spikes), current, sequences

    def _states_for(self, shape: torch.Size, x: Tensor) -> tuple[dict[str, State], int]:
        """The node's states and time step where they fit a step's shape and x, their reset values where not."""
        held = self._memories
        for name in self.states:
            state = held[name]
            if isinstance(state, Tensor) and state.ndim:
                fitting = shape, x.device, state_dtype(x.dtype)
                if (state.shape, state.device, state.dtype) != fitting:
                    held = self._memories_rv
                    break
        return {name: held[name] for name in self.states}, held.get("time_step", 0)

    def _commit(self, states: Mapping[str, Tensor], time_step: int) -> None:
        self._memories.update(states)
        if self.time_dependent:
            self._memories["time_step"] = time_step

    def _settle(self, compute: bool = True) -> None:
        """Make the memories a plain dict again; without ``compute``, pending states are left without values."""
        memories = self._memories
        if type(memories) is PendingMemories:
            self.__dict__["_memories"] = memories.copy() if compute else memories.unread()
            self._states_read = self._states_read or memories.computed

    _settle._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # The functional interface of SpikingJelly 2; the old line never calls it.

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """The states given by the caller, as tensors that fit the input.

        :raises ValueError: for a state of another shape, dtype or device than the input asks for
        """
        check_input(inputs[0], step_mode, type(self).__name__)
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        dtype = state_dtype(x.dtype)
        tensors = []
        for name, state in zip(self.states, states, strict=False):
            if isinstance(state, Tensor) and state.ndim > 0:
                found, expected = (state.shape, state.dtype, state.device), (x.shape, dtype, x.device)
                if found != expected:
                    raise ValueError(
                        f"{type(self).__name__}: state {name!r}: expected shape, dtype and device {expected}, "
                        f"got {found}"
                    )
            tensors.append(as_state(state, x, dtype))
        return (*tensors, *states[len(self.states) :])

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """One step from explicit states, in the order of :meth:`named_memories`: ``((spike,), new states)``."""
        step = states[-1] if self.time_dependent else 0
        spikes, updated, *_ = self._run(inputs[0].unsqueeze(0), dict(zip(self.states, states, strict=False)), step)
        return (spikes[0],), (*updated.values(), *((step + 1,) if self.time_dependent else ()))

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """T steps from explicit states: ``((spikes,), new states)``."""
        spikes, updated, *_ = self._run(inputs[0], dict(zip(self.states, states, strict=False)), 0)
        return (spikes,), (*updated.values(), *((0,) if self.time_dependent else ()))

    # What SpikingJelly's own tools expect of a neuron.

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
            self._settle(compute=False)
            self._memories.update(self._memories_rv)
        else:
            self._settle()  # a reset to a tensor copies it into the state, which needs memory of its own for that
            super().reset()
        if self._store_v_seq:
            self._forget_sequences()
        self.__dict__["_sequence"] = ((), {})

    def detach(self) -> None:
        """Cut the states from the graph. A returned spike may be a state too, so nothing is detached in place."""
        self._sequence = ((), {})
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                self._memories[name] = value.detach()
        for name in self._sequence_names():
            sequence = getattr(self, name)
            if sequence is not None:
                setattr(self, name, sequence.detach())

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}, "
            f"step_mode={self.step_mode}, backend={self.backend}"
        )

    def _append_sequence(self, name: str, step: Tensor) -> None:
        """Lengthen a stored sequence by a single step; it starts again when the input's shape, dtype or device did."""
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

    def __getattr__(self, name: str) -> Any:
        # The old line's AttributeMonitor calls this directly, for plain attributes (v_seq) too.
        attributes = self.__dict__
        return attributes[name] if name in attributes else super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the states without their graph, which could not be copied."""
        state = {**self.__dict__, "_sequence": ((), {})}
        state["_memories"] = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in self._memories.items()
        }
        for name in self._sequence_names():
            if isinstance(state[name], Tensor):
                state[name] = state[name].detach()
        return state
