"""Where a SpikingJelly neuron's time step is written on either line, how its states start, and what it records."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from spikingjelly.activation_based import base, functional, neuron
from torch import Tensor

from . import LINE, SPIKINGJELLY_2


class SpikingNode(Protocol):
    """What a call may need of a neuron whose class is SpikingJelly's or a user's. No class has all of these."""

    _fused_states: tuple[str, ...]
    _memories: dict[str, Any]
    T: int
    v: Any
    store_v_seq: bool
    v_seq: Tensor
    store_state_seqs: bool
    state_seqs: list[Tensor]

    def v_float_to_tensor(self, x: Tensor) -> None: ...

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]: ...

    def _append_v_seq(self, v: Tensor) -> None: ...


HOOKS = ("neuronal_charge", "neuronal_adaptation", "neuronal_fire", "neuronal_reset")
"""The methods from which 0.0.0.0.14 composes a step."""

WHOLE = ("forward", "multi_step_forward", "functional_forward", "multi_step_functional_forward")
"""The methods that compute more than one step."""


class NoStepError(ValueError):
    """A class of neurons has no single time step that could be taken from it. The message gives the reason."""


@dataclass(frozen=True)
class StepSource:
    """One time step of a class of neurons.

    :param equations: the step: a function of ``self``, or a stand-in for it, and x that sets states and returns the
        spike
    :param hooks: a class with the methods that 0.0.0.0.14 has and 2.x lacks; None if none is needed
    :param note: a remark on the step in a report
    :param differs: whether SpikingJelly itself runs other equations on this line
    :param effective: computes a neuron's effective parameters: by name, a tensor, and whether it is per step
    :param modes: the step modes that SpikingJelly has for the class
    """

    equations: Callable[[Any, Tensor], Tensor]
    hooks: type | None = None
    note: str = ""
    differs: bool = False
    effective: Callable[[Any], dict[str, tuple[Tensor, bool]]] | None = None
    modes: tuple[str, ...] = ("s", "m")


def is_neuron(cls: type) -> bool:
    """Whether a class is one of SpikingJelly's neurons, derives from one, or has a ``neuronal_charge`` like them."""
    derived = any(c.__module__.startswith(neuron.__name__) for c in cls.__mro__)
    return derived or (issubclass(cls, base.MemoryModule) and hasattr(cls, "neuronal_charge"))


def starts_itself(cls: type) -> bool:
    """Whether a user's class defines from which states a call starts."""
    names = ("materialize_states",) if SPIKINGJELLY_2 else ("v_float_to_tensor", "w_float_to_tensor")
    return any(not is_upstream(_definer(cls, name)) for name in names)


def is_upstream(cls: type) -> bool:
    """Whether a class is SpikingJelly's or torch's own.

    torch makes a class for each module with a parametrization. Such a class counts as the user's.
    """
    if cls.__module__ == "torch.nn.utils.parametrize":
        return False
    return cls is object or cls.__module__.partition(".")[0] in ("spikingjelly", "torch")


def state_names(node: base.MemoryModule) -> tuple[str, ...]:
    """The states that a step carries to the next: the memories, without 0.0.0.0.14's record of them."""
    return tuple(name for name in node._memories if name != "v_seq")


@functools.lru_cache(maxsize=4096)
def step_source(cls: type) -> StepSource:
    """Where the time step of a class of neurons is written.

    :raises NoStepError: for a class that has none, or that does more in a call than to repeat it
    """
    if not issubclass(cls, base.MemoryModule):
        raise NoStepError("it is no MemoryModule, so SpikingJelly keeps no states for it")
    for name in WHOLE:
        if not is_upstream(_definer(cls, name)):
            raise NoStepError(
                f"{_definer(cls, name).__name__} defines {name}, which may do more than repeat a step; write the step "
                "as neuronal_charge, neuronal_fire and neuronal_reset and leave that method to SpikingJelly"
            )
    if _definer(cls, "forward") is not base.MemoryModule:
        raise NoStepError(f"{_definer(cls, 'forward').__name__} defines forward, which does more than repeat a step")
    return _step_source_2(cls) if SPIKINGJELLY_2 else _step_source_14(cls)


def _definer(cls: type, name: str) -> type:
    return next((c for c in cls.__mro__ if name in vars(c)), object)


def _depth_of_users(cls: type, *names: str) -> int:
    """The position, in a class's mro, of the first user's class that defines one of these methods; else its length."""
    mro = cls.__mro__
    return next((i for i, c in enumerate(mro) if not is_upstream(c) and any(n in vars(c) for n in names)), len(mro))


def _method(cls: type, name: str) -> Callable[[Any, Tensor], Tensor]:
    """A method of a class as equations. A trace notes it like the other methods that equations call."""
    function = getattr(cls, name)

    def equations(self: Any, x: Tensor) -> Tensor:
        return function(self, x)

    return equations


def _by_hooks(self: Any, x: Tensor) -> Tensor:
    self.neuronal_charge(x)
    spike = self.neuronal_fire()
    self.neuronal_reset(spike)
    return spike


def _by_adaptive_hooks(self: Any, x: Tensor) -> Tensor:
    self.neuronal_charge(x)
    self.neuronal_adaptation()
    spike = self.neuronal_fire()
    self.neuronal_reset(spike)
    return spike


def _step_source_14(cls: type) -> StepSource:
    single = _definer(cls, "single_step_forward")
    if single in (base.MemoryModule, object):
        raise NoStepError("it has no single_step_forward")
    definer = _definer(cls, "multi_step_forward")
    depth = min(_depth_of_users(cls, *HOOKS), cls.__mro__.index(single))
    if definer not in (neuron.IFNode, neuron.LIFNode) or depth >= cls.__mro__.index(definer):
        return StepSource(_method(cls, "single_step_forward"))
    equations = _method(neuron.BaseNode if single is definer else cls, "single_step_forward")
    note = f"in eval mode SpikingJelly {LINE} runs {definer.__name__}'s step instead of this class's methods"
    return StepSource(equations, note=note, differs=True)


def _step_source_2(cls: type) -> StepSource:
    hooks, single = _depth_of_users(cls, *HOOKS), _depth_of_users(cls, "single_step_forward")
    functional = _depth_of_users(cls, "single_step_functional_forward")
    simple = issubclass(cls, neuron.SimpleBaseNode)
    if single <= min(hooks, functional) and single < len(cls.__mro__):
        equations = _method(cls, "single_step_forward")
        if simple:
            return StepSource(equations)
        note = f"in multi-step mode SpikingJelly {LINE} does not run this class's single_step_forward"
        return StepSource(equations, note=note, differs=True)
    if functional <= hooks and functional < len(cls.__mro__):
        return _functional_step(cls)
    if hooks < len(cls.__mro__) and not simple:
        return _hooked_step(cls)
    upstream = next(c for c in cls.__mro__ if is_upstream(c))
    if upstream is neuron.ActivationAwareIFNode:
        return StepSource(_activation_aware_step)
    if upstream is getattr(neuron, "GatedLIFNode", None):
        return StepSource(_gated_lif, effective=_gated_lif_parameters, modes=("m",))
    if simple:
        return StepSource(_method(cls, "single_step_forward"))
    if _definer(cls, "single_step_functional_forward") in (base.MemoryModule, neuron.BaseNode):
        raise NoStepError("it has no single step: SpikingJelly computes all of its steps at once")
    if _definer(cls, "single_step_forward") not in (base.MemoryModule, neuron.BaseNode):
        raise NoStepError(f"{_definer(cls, 'single_step_forward').__name__} does more in a step than to fire")
    return _functional_step(cls)


def _functional_step(cls: type) -> StepSource:
    """2.x's pure step as equations that set the states of ``self``, whose names are ``self._fused_states``."""
    function = cls.single_step_functional_forward  # type: ignore[attr-defined]

    def equations(self: Any, x: Tensor) -> Tensor:
        names = self._fused_states
        outputs, states = function(self, (x,), tuple(getattr(self, name) for name in names))
        if len(outputs) != 1:
            raise NoStepError(f"its step returns {len(outputs)} outputs, expected the spike alone")
        for name, state in zip(names, states, strict=True):
            setattr(self, name, state)
        return outputs[0]

    definer = _definer(cls, "multi_step_functional_forward")
    if definer is base.MemoryModule or issubclass(definer, _definer(cls, "single_step_functional_forward")):
        return StepSource(equations)
    note = f"in multi-step mode SpikingJelly {LINE} runs {definer.__name__}'s step instead of this class's"
    return StepSource(equations, note=note, differs=True)


def _hooked_step(cls: type) -> StepSource:
    upstream = next(c for c in cls.__mro__ if is_upstream(c))
    kind = _hooks_of().get(upstream)
    if kind is None:
        raise NoStepError(
            f"it overrides a method of {upstream.__name__}, of which SpikingJelly {LINE} has no charge, fire and "
            "reset; derive it from BaseNode and write all three"
        )
    if upstream is neuron.BaseNode:
        note = f"SpikingJelly {LINE} itself cannot run a BaseNode with charge, fire and reset"
    else:
        note = f"SpikingJelly {LINE} itself runs {upstream.__name__}'s step instead of this class's methods"
    adaptive = issubclass(upstream, neuron.AdaptBaseNode) or hasattr(cls, "neuronal_adaptation")
    return StepSource(_by_adaptive_hooks if adaptive else _by_hooks, kind, note, differs=True)


PLAIN: dict[Any, Any] = {}
"""For each of 2.x's functions that computes a step by a registered operator, the same step in plain torch."""

_exchanging = threading.RLock()


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within this context, 2.x's functions compute their steps in plain torch.

    Their code is exchanged, and the functions stay the same objects. A module that has imported one therefore calls the
    exchanged code, and what a trace notes of a function still holds afterwards. Another thread that calls one meanwhile
    gets the same result.
    """
    with _exchanging:
        original = {function: function.__code__ for function in PLAIN}
        try:
            for function, plain in PLAIN.items():
                function.__code__ = plain.__code__
            yield
        finally:
            for function, code in original.items():
                function.__code__ = code


@functools.cache
def _hooks_of() -> dict[type, type]:
    return {}


if SPIKINGJELLY_2:
    # These functions do in plain torch what 2.x's steps do by a registered operator. Only their code is used, in place
    # of the steps' own code, so they name nothing but their arguments.

    def _if_step(x, v, v_threshold, v_reset, surrogate_function, detach_reset):  # type: ignore[no-untyped-def]
        from spikingjelly._ops.if_.reference import step

        return step(x, v, v_threshold, v_reset, surrogate_function, detach_reset)[:2]

    def _lif_step(  # type: ignore[no-untyped-def]
        x, v, tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset
    ):
        from spikingjelly._ops.lif.reference import step

        return step(x, v, tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset)[:2]

    def _plif_step(  # type: ignore[no-untyped-def]
        x, v, w, decay_input, v_threshold, v_reset, surrogate_function, detach_reset
    ):
        from spikingjelly._ops.plif.reference import step

        return step(x, v, w, decay_input, v_threshold, v_reset, surrogate_function, detach_reset)[:2]

    def _qif_step(  # type: ignore[no-untyped-def]
        x, v, tau, a0, v_rest, v_c, v_threshold, v_reset, surrogate_function, detach_reset
    ):
        from spikingjelly._ops.qif.reference import step

        return step(x, v, tau, a0, v_rest, v_c, v_threshold, v_reset, surrogate_function, detach_reset)[:2]

    def _eif_step(  # type: ignore[no-untyped-def]
        x, v, tau, delta_t, theta_rh, v_rest, v_threshold, v_reset, surrogate_function, detach_reset
    ):
        from spikingjelly._ops.eif.reference import step

        return step(x, v, tau, v_rest, theta_rh, delta_t, v_threshold, v_reset, surrogate_function, detach_reset)[:2]

    def _izhikevich_step(  # type: ignore[no-untyped-def]
        x, v, w, tau, a0, v_rest, v_c, tau_w, a, b, v_threshold, v_reset, surrogate_function, detach_reset
    ):
        from spikingjelly._ops.izhikevich.reference import step

        rest = v_threshold, v_reset, surrogate_function, detach_reset
        return step(x, v, w, tau, v_rest, v_c, a0, a, b, tau_w, *rest)[:3]

    PLAIN.update({
        functional.if_step: _if_step, functional.lif_step: _lif_step, functional.plif_step: _plif_step,
        functional.qif_step: _qif_step, functional.eif_step: _eif_step, functional.izhikevich_step: _izhikevich_step,
    })  # fmt: skip

    def _activation_aware_step(self: Any, x: Tensor) -> Tensor:
        threshold, offset = (_along(value, self.channel_dim) for value in (self.v_threshold, self.v_offset))
        charged = self.v + x
        spike = self.surrogate_function(charged + offset - threshold)
        self.v = functional.voltage_reset(charged, spike, threshold, self.v_reset, self.detach_reset)
        return spike

    def _along(value: Tensor, channel_dim: int) -> Tensor:
        """A value for each channel, shaped to broadcast along a dimension that is counted from the last one."""
        if value.dim() == 0:
            return value
        if channel_dim >= 0:
            raise NoStepError(
                f"channel_dim={channel_dim} is counted from the first dimension; give it as a negative one"
            )
        return value.view(-1, *(1,) * (-1 - channel_dim))

    class BaseHooks:
        """0.0.0.0.14's methods of ``BaseNode``, for a class whose methods were written for them."""

        def neuronal_charge(self, x: Tensor) -> None:
            raise NotImplementedError(f"{type(self).__name__} must define neuronal_charge(self, x)")

        def neuronal_fire(self: Any) -> Tensor:
            return self.surrogate_function(self.v - self.v_threshold)

        def neuronal_reset(self: Any, spike: Tensor) -> None:
            self.v = functional.voltage_reset(self.v, spike, self.v_threshold, self.v_reset, self.detach_reset)

        @staticmethod
        def jit_hard_reset(v: Tensor, spike: Tensor, v_reset: float) -> Tensor:
            return (1.0 - spike) * v + spike * v_reset

        @staticmethod
        def jit_soft_reset(v: Tensor, spike: Tensor, v_threshold: float) -> Tensor:
            return v - spike * v_threshold

        def v_float_to_tensor(self: Any, x: Tensor) -> None:
            if isinstance(self.v, float):
                self.v = torch.full_like(x.data, self.v)

    class IFHooks(BaseHooks):
        def neuronal_charge(self: Any, x: Tensor) -> None:
            self.v = self.v + x

    class LIFHooks(BaseHooks):
        def neuronal_charge(self: Any, x: Tensor) -> None:
            self.v = functional.lif_charge(x, self.v, self.tau, self.decay_input, self.v_reset)

    class PLIFHooks(BaseHooks):
        def neuronal_charge(self: Any, x: Tensor) -> None:
            reset, leak = self.v_reset or 0.0, self.w.sigmoid()
            self.v = self.v + ((x - (self.v - reset)) * leak if self.decay_input else x - (self.v - reset) * leak)

    class QIFHooks(BaseHooks):
        def neuronal_charge(self: Any, x: Tensor) -> None:
            self.v = self.v + (x + self.a0 * (self.v - self.v_rest) * (self.v - self.v_c)) / self.tau

    class EIFHooks(BaseHooks):
        def neuronal_charge(self: Any, x: Tensor) -> None:
            rise = self.delta_T * torch.exp((self.v - self.theta_rh) / self.delta_T)
            self.v = self.v + (x + self.v_rest - self.v + rise) / self.tau

    class AdaptHooks(BaseHooks):
        def neuronal_reset(self: Any, spike: Tensor) -> None:
            super().neuronal_reset(spike)
            self.w = self.w + self.b * spike

    class IzhikevichHooks(AdaptHooks):
        def neuronal_charge(self: Any, x: Tensor) -> None:
            self.v = self.v + (x + self.a0 * (self.v - self.v_rest) * (self.v - self.v_c) - self.w) / self.tau

    class KLIFHooks(BaseHooks):
        def neuronal_charge(self: Any, x: Tensor) -> None:
            self.v = torch.relu(self.k * functional.lif_charge(x, self.v, self.tau, self.decay_input, self.v_reset))

        def neuronal_reset(self: Any, spike: Tensor) -> None:
            scale = self.k if self.scale_reset else 1.0
            self.v = functional.voltage_reset(
                self.v / scale, spike, self.v_threshold / scale, self.v_reset, self.detach_reset
            )

    _hooks_of().update({
        neuron.BaseNode: BaseHooks, neuron.IFNode: IFHooks, neuron.LIFNode: LIFHooks,
        neuron.ParametricLIFNode: PLIFHooks, neuron.QIFNode: QIFHooks, neuron.EIFNode: EIFHooks,
        neuron.AdaptBaseNode: AdaptHooks, neuron.IzhikevichNode: IzhikevichHooks, neuron.KLIFNode: KLIFHooks,
    })  # fmt: skip


def _gated_lif(self: Any, x: Tensor) -> Tensor:
    """2.x's GatedLIF: its memory ``u`` holds the previous spike within a call."""
    p, v, spike = self.effective, self.v, self.u
    keep = 1 - p.alpha * (1 - p.tau)
    charged = keep * v - (1 - p.alpha) * p.linear_decay + x * (1 - p.beta * (1 - p.conduct))
    self.v = charged - keep * v * p.gamma * spike - (1 - p.gamma) * p.v_subreset * spike
    self.u = self.surrogate_function(self.v - p.v_threshold)
    return self.u


def _gated_lif_parameters(node: neuron.BaseNode) -> dict[str, tuple[Tensor, bool]]:
    names = ("alpha", "beta", "gamma", "tau", "v_threshold", "linear_decay", "v_subreset")
    return {**{n: (getattr(node, n).sigmoid(), False) for n in names}, "conduct": (node.conduct.sigmoid(), True)}


def _is_gated(node: SpikingNode) -> bool:
    return SPIKINGJELLY_2 and isinstance(node, neuron.GatedLIFNode)


def check_sequence(node: SpikingNode, x_seq: Tensor) -> None:
    """:raises ValueError: for a sequence whose length differs from that for which the neuron was made"""
    if _is_gated(node) and x_seq.shape[0] != node.T:
        raise ValueError(f"{type(node).__name__}: expected T = {node.T} time steps, got {x_seq.shape[0]}")


def starting_states(node: SpikingNode, x: Tensor, step_mode: str, dtype: torch.dtype, own: bool) -> dict[str, Any]:
    """The states from which SpikingJelly would start a call with input x.

    :param dtype: the dtype of states. States that a call left in it stay so; SpikingJelly would convert them to x's.
    :param own: what :func:`starts_itself` says of the neuron's class
    """
    names = node._fused_states
    memories = tuple(node._memories[name] for name in names)
    if _is_gated(node):
        return {"v": node.v, "u": 0.0}
    if not own and {int, float}.issuperset(map(type, memories)):
        return dict(zip(names, memories, strict=True))
    step = x[0] if step_mode == "m" else x
    if not SPIKINGJELLY_2:
        if own and not isinstance(node.v, Tensor):
            node.v_float_to_tensor(step)
            memories = tuple(node._memories[name] for name in names)
        return dict(zip(names, memories, strict=True))
    if not own and all(
        isinstance(s, Tensor) and s.shape == step.shape and s.device == step.device and s.dtype == dtype
        for s in memories
    ):
        return dict(zip(names, memories, strict=True))
    return dict(zip(names, node.materialize_states((x,), memories, step_mode), strict=True))


def left_states(node: SpikingNode, final: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states that a call leaves."""
    return {"v": final["v"], "u": final["v"]} if _is_gated(node) else dict(final)


def stores_states(node: SpikingNode, step_mode: str) -> bool:
    """Whether a call records the states of every step."""
    cls = type(node)  # asking the node for a missing attribute would take far longer
    if hasattr(cls, "store_state_seqs") and node.store_state_seqs:  # ComplementaryLIFNode
        return step_mode == "m"
    if not hasattr(cls, "store_v_seq") or not node.store_v_seq:
        return False
    return step_mode == "m" or (SPIKINGJELLY_2 and isinstance(node, neuron.BaseNode))


def store_states(node: SpikingNode, sequences: Mapping[str, Tensor], step_mode: str) -> None:
    """Record the states of every step, ``[T, N, *]``, as SpikingJelly does."""
    if getattr(node, "store_state_seqs", False):
        node.state_seqs = list(sequences.values())
    elif step_mode == "s":
        node._append_v_seq(sequences["v"][0])
    else:
        node.v_seq = sequences["v"]
