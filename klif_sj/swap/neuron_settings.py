"""The settings of a neuron, under names that all neurons share, so that two neurons can be compared."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _compat
from ..neuron import CLIFNode, FusedNode, GLIFNode, KLIFNode

Settings = dict[str, Any]

SPIKING_NEURONS = _compat.spiking_neurons()
"""SpikingJelly's neuron classes by name, read before a :class:`klif_sj.patched` block can replace any of them."""

KINDS: dict[str, tuple[type, ...]] = {
    kind: tuple(SPIKING_NEURONS[name] for name in upstream_names if name in SPIKING_NEURONS) + our_classes
    for kind, upstream_names, our_classes in (
        ("IF", ("IFNode",), ()),
        ("LIF", ("LIFNode",), ()),
        ("PLIF", ("ParametricLIFNode",), ()),
        ("KLIF", ("KLIFNode",), (KLIFNode,)),
        ("GLIF", ("GatedLIFNode",), (GLIFNode,)),
        ("CLIF", ("ComplementaryLIFNode",), (CLIFNode,)),
    )
}
"""The kinds of neurons whose equations are known here, and the classes that compute them."""

RUNNING = ("step_mode", "store_v_seq", "keep_state", "backend")
"""The settings that say how a neuron runs. All other settings say what it computes."""


def is_neuron_class(cls: object) -> bool:
    """Whether ``cls`` is a class of spiking neurons: SpikingJelly's, a subclass, or one with states and a threshold."""
    if not isinstance(cls, type) or not issubclass(cls, MemoryModule):
        return False
    known = issubclass(cls, (BaseNode, *SPIKING_NEURONS.values()))
    return known or "v_threshold" in constructor_parameters(cls, of_bases=True)


def can_be_built(cls: object) -> bool:
    """Whether ``cls`` is a class of spiking neurons with equations of its own, and not only a base class."""
    return is_neuron_class(cls) and cls not in (BaseNode, FusedNode)


def kind_of(cls: type) -> str:
    """The key of :data:`KINDS` that a neuron class or its nearest base belongs to, else the class's name."""
    return next((kind for base in cls.__mro__ for kind, classes in KINDS.items() if base in classes), cls.__name__)


def constructor_parameters(cls: type, *, of_bases: bool = False) -> list[str]:
    """The names of a constructor's parameters and, if it takes ``**kwargs``, of the base classes' parameters.

    :param of_bases: True includes the base classes' parameters in any case
    """
    names: dict[str, None] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= {p.name: None for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not of_bases and all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def settings_of(node: MemoryModule) -> tuple[Settings, Settings]:
    """A neuron's settings, and further settings that its equations imply, which serve for comparison only.

    The names are those of the constructors' parameters. ``tau`` is the membrane time constant in time steps, infinite
    for a neuron that does not leak; only GLIF's ``tau`` is a parameter. Parameters are returned as they are, under
    their own names.
    """
    names = constructor_parameters(type(node), of_bases=True)
    settings = {name: getattr(node, name) for name in names if hasattr(node, name)}
    settings |= {name: value for name, value in node._parameters.items() if value is not None}
    implied: Settings = {"activation": "identity"}
    kind = kind_of(type(node))
    if kind == "IF":
        implied["tau"] = math.inf
        # IF adds its whole input to the potential.
        settings["decay_input"] = False
    elif kind == "PLIF":
        w = settings.pop("w")
        settings["tau"] = 1.0 / w.detach().double().sigmoid().item()
        implied["learn_tau"] = w.requires_grad
    elif kind == "KLIF":
        implied.clear()
        settings = {"activation": "relu", "k_bounds": None} | settings | {"learn_k": node.k.requires_grad}
    elif kind == "CLIF":
        settings.setdefault("decay_input", False)
        if "store_state_seqs" in settings:
            settings["store_v_seq"] = settings.pop("store_state_seqs")
    elif kind == "GLIF":
        settings.pop("v_reset", None)
        settings = {"inplane": _channels(node.conduct), "detach_reset": False} | settings
        learned = {"learn_gates": node.alpha, "learn_membrane": node.tau}
        settings |= {name: value.requires_grad for name, value in learned.items() if value is not None}
    if "keep_state" not in settings:
        implied["keep_state"] = True
    if isinstance(settings.get("tau"), float):
        implied.setdefault("learn_tau", False)
    return settings, implied


def arguments_for(cls: type, settings: Mapping[str, Any]) -> Settings:
    """The constructor arguments with which a neuron of the class comes as close to ``settings`` as it can."""
    kind, settings = kind_of(cls), dict(settings)
    tau, v_threshold = settings.get("tau"), settings.get("v_threshold")
    if kind == "PLIF":
        settings["init_tau"] = tau
    elif kind == "GLIF":
        # In a step, LIF keeps the fraction 1 - 1/tau of its potential. GLIF calls the fraction that it keeps tau.
        if isinstance(tau, float) and tau > 1.0 and leaks(tau):
            settings["init_tau"] = 1.0 - 1.0 / tau
        if isinstance(v_threshold, float) and 0.0 < v_threshold < 1.0:
            settings["init_v_threshold"] = v_threshold
    elif kind == "CLIF":
        settings["store_state_seqs"] = settings.get("store_v_seq", False)
    numbers = {name: value for name, value in settings.items() if not isinstance(value, Tensor)}
    return {name: numbers[name] for name in constructor_parameters(cls) if name in numbers}


def leaks(tau: float) -> bool:
    """Whether a membrane with this time constant leaks, as far as floating-point numbers can tell."""
    return 1.0 + 1.0 / tau != 1.0


def same(name: str, first: object, second: object) -> bool:
    """Whether two values of the setting ``name`` mean the same. Surrogates of one class count as copies."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if is_lazy(first) or is_lazy(second):
            return is_lazy(first) and is_lazy(second)
        return torch.equal(first.detach().cpu().double(), second.detach().cpu().double())
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    if name == "tau" and isinstance(first, float) and isinstance(second, float):
        return first == second or not (leaks(first) or leaks(second))
    return first == second or (isinstance(first, nn.Module) and type(first) is type(second))


def show(value: object) -> str:
    """A setting as one line of text."""
    if isinstance(value, Tensor):
        learned = "learned" if value.requires_grad else "fixed"
        if is_lazy(value):
            return f"{learned}, shape by the first input"
        return f"{value.item():g} ({learned})" if value.ndim == 0 else f"{list(value.shape)} ({learned})"
    return " ".join(repr(value).split())


def snapshot(value: object) -> object:
    """A copy of a setting as it is now. A report describes the moment of the swap, but a parameter may learn on."""
    if not isinstance(value, Tensor):
        return value
    return show(value) if is_lazy(value) else value.detach().clone().requires_grad_(value.requires_grad)


def plain(value: object) -> object:
    """A setting as a JSON value, or as text if JSON has no such value."""
    if isinstance(value, tuple):
        return list(value)
    is_json = (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )
    return value if is_json else show(value)


def _channels(conduct: Tensor) -> int | None:
    return conduct.shape[1] if not is_lazy(conduct) and conduct.ndim == 2 else None
