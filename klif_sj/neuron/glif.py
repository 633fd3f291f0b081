"""GLIF (NeurIPS 2022): a leaky integrate-and-fire neuron that learns how it leaks, integrates and resets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from .._checks import check_bool, check_choice, check_input, check_number
from ..surrogate import Rect
from .base import EffectiveParameters, FusedNode
from .parameters import PerStep

GATES = ("alpha", "beta", "gamma")
MEMBRANE = ("tau", "v_threshold", "linear_decay", "v_subreset", "conduct")


class GLIFNode(LazyModuleMixin, FusedNode):
    r"""Gated leaky integrate-and-fire neuron.

    .. math::
        U[t] &= (1 - \alpha (1 - \tau))\, U[t-1] (1 - \gamma S[t-1]) - (1 - \alpha)\, \lambda
                + X[t] (1 - \beta (1 - g[t])) - (1 - \gamma)\, V_{sub} S[t-1] \\
        S[t] &= \Theta(U[t] - V_{th})

    Each of three gates mixes two ways. :math:`\alpha` mixes an exponential decay :math:`\tau` with a linear decay
    :math:`\lambda` (``linear_decay``). :math:`\beta` mixes an input conductance :math:`g[t]` (``conduct``), which has a
    value for every time step, with no conductance. :math:`\gamma` mixes a hard reset with a soft reset by
    :math:`V_{sub}` (``v_subreset``). With ``gates="none"`` the neuron is the paper's GLIF_f, which has no gates:

    .. math::
        U[t] = \tau\, U[t-1] (1 - S[t-1]) - \lambda + X[t]\, g[t] - V_{sub} S[t-1]

    The states are ``v`` (U) and ``spike`` (S), both 0 at first and both carried from call to call: a spike resets the
    potential in the next time step. Nothing is detached.

    Every parameter is stored raw: the value in the equation is :math:`\sigma(\text{raw})`. Names and shapes are those
    of SpikingJelly 2's ``GatedLIFNode``, so that state dicts load both ways. Channel-wise, ``conduct`` is ``[T, C]``
    and the others are ``[C]``; layer-wise, ``conduct`` is ``[T]`` and the others are scalars. A node without gates has
    no ``alpha``, ``beta`` and ``gamma``.

    Time steps: a multi-step call starts at the first step of ``conduct``; single steps are counted, until
    :meth:`reset`, in the memory ``time_step``. More steps than T are an error.

    A node whose T or channel count is yet to be read from its first input is one of torch's lazy modules: it can be
    moved, copied, saved and loaded, and its parameters get their shapes and values in the first call (not through
    SpikingJelly's functional interface) or from a checkpoint. Until then ``parameter_groups`` refuses it, and
    ``DistributedDataParallel`` cannot take it, so call it once before.

    Source: Yao et al., "GLIF: A unified gated leaky integrate-and-fire neuron for spiking neural networks", NeurIPS
    2022, and its authors' code, whose surrogate is the default here (``GatedLIFNode``'s is ``Sigmoid``). The authors'
    neuron fires at U > V_th; this neuron fires at U >= V_th, as SpikingJelly's neurons do.

    :param T: number of time steps; None reads it from the first sequence, in multi-step mode
    :param inplane: number of channels (channel-wise); None for one value in the whole layer (layer-wise); ``"lazy"``
        for channel-wise with the number read from the first input
    :param init_linear_decay: initial :math:`\lambda`, None for ``init_v_threshold / (2 T)``
    :param init_v_subreset: initial :math:`V_{sub}`, None for ``init_v_threshold``
    :param init_tau: initial :math:`\tau`, which is the fraction of the potential that is kept, not a time constant
    :param init_v_threshold: initial :math:`V_{th}`
    :param init_conduct: initial :math:`g` of all time steps. All initial values lie strictly between 0 and 1. The raw
        gates are drawn uniformly from (-0.1, 0.1).
    :param surrogate_function: None makes a new ``Rect(alpha=1)``, the authors' surrogate
    :param step_mode: ``'m'``, ``[T, N, *]``, or ``'s'``, ``[N, *]``
    :param backend: ``'auto'``, ``'torch'``, ``'cpp'`` or ``'cupy'``
    :param store_v_seq: keep U and S at every time step in ``v_seq`` and ``spike_seq``
    :param gates: ``"soft"`` for the paper's gates; ``"hard"`` for gates that are 1 where
        :math:`\sigma(\text{raw}) > 1/2` and 0 elsewhere, with the gradient of the soft gate; ``"none"`` for GLIF_f
    :param learn_gates: False freezes the gates (the authors' static gates)
    :param learn_membrane: False freezes the other five parameters (the authors' static parameters)
    :param time_wise: whether all five parameters that are no gates have a value for each time step: ``[T, C]``, ``[T]``
    :param channel_dim: the dimension of a single step's input ``[N, *]`` that holds the channels, from 1
    :param keep_state: False does not keep the final states of multi-step calls; see :class:`FusedNode`

    :raises ValueError: for an initial value outside (0, 1), an unknown gate mode, a T or a number of channels below 1;
        in a call, for more time steps than T, another number of channels, or a single step of a node with unknown T.
        The states are as before the call.
    """

    states = ("v", "spike")
    time_dependent = True
    gate_parameters = GATES

    T: int | None
    inplane: int | Literal["lazy"] | None
    spike: Tensor
    tau: nn.Parameter
    v_threshold: nn.Parameter
    linear_decay: nn.Parameter
    v_subreset: nn.Parameter
    conduct: nn.Parameter

    def __init__(
        self,
        T: int | None = None,
        inplane: int | Literal["lazy"] | None = "lazy",
        init_linear_decay: float | None = None,
        init_v_subreset: float | None = None,
        init_tau: float = 0.25,
        init_v_threshold: float = 0.5,
        init_conduct: float = 0.5,
        surrogate_function: Callable | None = None,
        step_mode: str = "m",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        gates: str = "soft",
        learn_gates: bool = True,
        learn_membrane: bool = True,
        time_wise: bool = False,
        channel_dim: int = 1,
        keep_state: bool = True,
    ) -> None:
        T = None if T is None else _check_count("T", T)
        if inplane is not None and inplane != "lazy":
            inplane = _check_count("inplane", inplane, "an integer, None or 'lazy'")
        node_options: dict[str, Any] = {
            "v_threshold": _check_fraction("init_v_threshold", init_v_threshold),
            "v_reset": None,
            "surrogate_function": Rect(alpha=1.0) if surrogate_function is None else surrogate_function,
            "step_mode": step_mode,
            "backend": backend,
            "store_v_seq": store_v_seq,
            "keep_state": keep_state,
        }
        if T is None or inplane == "lazy":
            # The mixin hooks into loading and into the first call, to learn the shapes that are not known yet.
            super().__init__(**node_options)
        else:
            FusedNode.__init__(self, **node_options)
        self.T, self.inplane = T, inplane
        self.gates = check_choice("gates", gates, ("soft", "hard", "none"))
        self.time_wise = check_bool("time_wise", time_wise)
        self.channel_dim = _check_count("channel_dim", channel_dim)
        self.init_linear_decay = (
            None if init_linear_decay is None else _check_fraction("init_linear_decay", init_linear_decay)
        )
        self.init_v_threshold = init_v_threshold
        self.init_v_subreset = _check_fraction(
            "init_v_subreset", init_v_threshold if init_v_subreset is None else init_v_subreset
        )
        self.init_tau = _check_fraction("init_tau", init_tau)
        self.init_conduct = _check_fraction("init_conduct", init_conduct)
        for name in GATES:
            gate = UninitializedParameter(requires_grad=check_bool("learn_gates", learn_gates))
            self.register_parameter(name, None if gates == "none" else gate)
        for name in MEMBRANE:
            setattr(self, name, UninitializedParameter(requires_grad=check_bool("learn_membrane", learn_membrane)))
        if T is not None and inplane != "lazy":
            self._materialize(T, inplane)

    def effective_parameters(self) -> EffectiveParameters:
        values: EffectiveParameters = {}
        for name in (*GATES, *MEMBRANE):
            raw = getattr(self, name)
            if raw is None:
                continue
            value = torch.sigmoid(raw)
            if name in GATES and self.gates == "hard":
                # The value is exactly 0 or 1, because the subtraction is exact. Its gradient is straight-through.
                value = value + ((value > 0.5).to(value) - value).detach()
            values[name] = PerStep(value) if self._is_per_step(name) else value
        return values

    def neuronal_charge(self, x: Tensor) -> None:
        p = self.effective
        if self.gates == "none":
            self.v = p.tau * self.v * (1 - self.spike) - p.linear_decay + x * p.conduct - p.v_subreset * self.spike
        else:
            decay = 1 - p.alpha * (1 - p.tau)
            conduct = 1 - p.beta * (1 - p.conduct)
            self.v = (
                decay * self.v * (1 - p.gamma * self.spike)
                - (1 - p.alpha) * p.linear_decay
                + x * conduct
                - (1 - p.gamma) * p.v_subreset * self.spike
            )

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.effective.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        self.spike = spike

    def initialize_parameters(self, x: Tensor) -> None:
        """Give the parameters the shapes that the first input tells. torch's lazy modules call this before forward."""
        if not self.has_uninitialized_params():
            return
        name = type(self).__name__
        check_input(x, self.step_mode, name)
        T, inplane = self.T, self.inplane
        if T is None:
            if self.step_mode == "s":
                raise ValueError(
                    f"{name}: expected the number of time steps, which a single step does not tell: build the neuron "
                    "with T=..., or call it in multi-step mode first"
                )
            T = x.shape[0]
        if inplane == "lazy":
            step_shape = tuple(x.shape[1:] if self.step_mode == "m" else x.shape)
            if self.channel_dim >= len(step_shape):
                raise ValueError(
                    f"{name}: expected channels in dimension {self.channel_dim} of a step's input, got a step of shape "
                    f"{step_shape}; build the neuron with inplane=None for one value in the whole layer"
                )
            inplane = step_shape[self.channel_dim]
        self._materialize(T, inplane)

    def extra_repr(self) -> str:
        return (
            f"T={self.T}, inplane={self.inplane}, gates={self.gates}, time_wise={self.time_wise}, "
            f"channel_dim={self.channel_dim}, step_mode={self.step_mode}, backend={self.backend}"
        )

    @torch.no_grad()
    def _materialize(self, T: int, inplane: int | None) -> None:
        """Shape and fill the parameters that are not initialised. A partial checkpoint initialises only some."""
        self.T, self.inplane = T, inplane
        for name, shape in self._shapes(T, inplane).items():
            raw = self._parameters[name]
            if is_lazy(raw):
                raw.materialize(shape)
                self._fill(name, raw, T)

    def _fill(self, name: str, raw: Tensor, T: int) -> None:
        if name in GATES:
            nn.init.uniform_(raw, -0.1, 0.1)
            return
        value = getattr(self, f"init_{name}")
        if value is None:
            value = self.init_v_threshold / (2 * T)
        nn.init.constant_(raw, math.log(value / (1 - value)))

    def _is_per_step(self, name: str) -> bool:
        return name == "conduct" or (self.time_wise and name not in GATES)

    def _shapes(self, T: int, inplane: int | None) -> dict[str, tuple[int, ...]]:
        channels = () if inplane is None else (inplane,)
        return {
            name: (T, *channels) if self._is_per_step(name) else channels
            for name, raw in self._parameters.items()
            if raw is not None
        }

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        conduct = state_dict.get(f"{prefix}conduct")
        if isinstance(conduct, Tensor) and not is_lazy(conduct) and conduct.ndim in (1, 2):
            T, inplane = conduct.shape[0], (conduct.shape[1] if conduct.ndim == 2 else None)
            error = self._checkpoint_error(state_dict, prefix, T, inplane)
            if error:
                error_msgs.append(f"{type(self).__name__} {prefix.rstrip('.')!r}: {error}")
                return
            self.T, self.inplane = T, inplane
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _checkpoint_error(self, state_dict: Mapping[str, Any], prefix: str, T: int, inplane: int | None) -> str:
        """The reason why a checkpoint of this T and inplane does not fit; empty if it does."""
        if self.T not in (None, T):
            return f"expected a checkpoint of T = {self.T} time steps, got one of T = {T}"
        if self.inplane != inplane and (self.inplane != "lazy" or inplane is None):
            return f"expected a checkpoint of inplane = {self.inplane!r}, got one of inplane = {inplane!r}"
        for name, shape in self._shapes(T, inplane).items():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and not is_lazy(value) and tuple(value.shape) != shape:
                return (
                    f"expected {name!r} of shape {shape} for T = {T}, inplane = {inplane}, "
                    f"time_wise = {self.time_wise}, got {tuple(value.shape)}"
                )
        return ""

    def _replicate_for_data_parallel(self) -> GLIFNode:
        # The mixin refuses every replica; a node that is initialised is no longer lazy.
        if self.has_uninitialized_params():
            return super()._replicate_for_data_parallel()
        return FusedNode._replicate_for_data_parallel(self)


class AuthorsCheckpoint(NamedTuple):
    """The result of :func:`from_authors`."""

    state_dict: dict[str, Tensor]
    """The checkpoint under the names of :class:`GLIFNode`. Entries that belong to no GLIF neuron are as they were."""

    unmapped: dict[str, str]
    """By name, the reason why ``state_dict`` lacks a parameter of the checkpoint or of GLIFNode."""


AUTHORS_NAMES = {
    **{name: name for name in GATES},
    "tau": "tau",
    "Vth": "v_threshold",
    "leak": "linear_decay",
    "reVth": "v_subreset",
    "conduct": "conduct",
}


def from_authors(state_dict: Mapping[str, Tensor]) -> AuthorsCheckpoint:
    """Rename the GLIF parameters in a state dict of the authors' code (a neuron's, or a whole network's).

    Both store raw values of the same shapes, so only names change. A neuron is recognised by having at least three of
    the authors' parameter names. ``unmapped`` reports a parameter that the authors' neuron does not have, because its
    membrane parameters are static (they are not saved: build the node with their values and ``learn_membrane=False``);
    the gate that a GLIF_f neuron saves but does not use; and a name that neither neuron has.

    :raises ValueError: where no GLIF neuron is found
    """
    neurons: dict[str, set[str]] = {}
    for key in state_dict:
        prefix, name = _split(key)
        neurons.setdefault(prefix, set()).add(name)
    neurons = {prefix: names for prefix, names in neurons.items() if len(names & AUTHORS_NAMES.keys()) >= 3}
    if not neurons:
        raise ValueError(
            f"expected a state dict with GLIF parameters ({', '.join(AUTHORS_NAMES)}), got keys {list(state_dict)[:8]}"
        )
    mapped: dict[str, Tensor] = {}
    unmapped: dict[str, str] = {}
    for key, value in state_dict.items():
        prefix, name = _split(key)
        if prefix not in neurons:
            mapped[key] = value
        elif name not in AUTHORS_NAMES:
            unmapped[key] = "no parameter of GLIFNode"
        elif name in GATES and not set(GATES) <= neurons[prefix]:
            unmapped[key] = 'not used by GLIF_f, the neuron of this checkpoint: GLIFNode(gates="none") does not have it'
        else:
            mapped[prefix + AUTHORS_NAMES[name]] = value
    for prefix, names in neurons.items():
        gateless = not set(GATES) <= names
        for theirs, ours in AUTHORS_NAMES.items():
            if theirs not in names and not (gateless and theirs in GATES):
                unmapped[prefix + ours] = f"not in the checkpoint, which has no {theirs!r} for this neuron"
    return AuthorsCheckpoint(mapped, unmapped)


def _split(key: str) -> tuple[str, str]:
    """A state dict's key as the prefix of its module, with the dot, and the parameter's name."""
    module, dot, name = key.rpartition(".")
    return module + dot, name


def _check_count(name: str, value: object, expected: str = "an integer") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer from 1, got {value!r}")
    return value


def _check_fraction(name: str, value: object) -> float:
    """Check that a sigmoid can take this value, and return it."""
    number = check_number(name, value)
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name}: expected a value strictly between 0 and 1, got {value!r}")
    return number
