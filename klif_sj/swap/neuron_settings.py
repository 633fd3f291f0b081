"""What a neuron is set to, in words that all neurons share, so that two of them can be compared."""

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
"""SpikingJelly's own by name, read before :class:`klif_sj.patched` could have put anything in their place."""

KINDS: dict[str, tuple[type, ...]] = {
    kind: tuple(SPIKING_NEURONS[name] for name in upstream if name in SPIKING_NEURONS) + ours
    for kind, upstream, ours in (
        ("IF", ("IFNode",), ()),
        ("LIF", ("LIFNode",), ()),
        ("PLIF", ("ParametricLIFNode",), ()),
        ("KLIF", ("KLIFNode",), (KLIFNode,)),
        ("GLIF", ("GatedLIFNode",), (GLIFNode,)),
        ("CLIF", ("ComplementaryLIFNode",), (CLIFNode,)),
    )
}
"""The neurons whose equations are known here, and which classes compute the same ones."""

RUNNING = ("step_mode", "store_v_seq", "keep_state", "backend")
"""Settings of how a neuron runs; all others are of what it computes."""


def is_neuron_class(cls: object) -> bool:
    """Whether it is a class of spiking neurons: SpikingJelly's, derived from them, or with states and a threshold."""
    if not isinstance(cls, type) or not issubclass(cls, MemoryModule):
        return False
    known = issubclass(cls, (BaseNode, *SPIKING_NEURONS.values()))
    return known or "v_threshold" in constructor_parameters(cls, of_bases=True)


def can_be_built(cls: object) -> bool:
    """Whether it is a class of spiking neurons with equations of its own, no mere base."""
    return is_neuron_class(cls) and cls not in (BaseNode, FusedNode)


def kind_of(cls: type) -> str:
    """The key of :data:`KINDS` that a neuron class or its nearest base belongs to, else the class's name."""
    return next((kind for base in cls.__mro__ for kind, classes in KINDS.items() if base in classes), cls.__name__)


def constructor_parameters(cls: type, *, of_bases: bool = False) -> list[str]:
    """Names that a class's constructor takes: its own and, where it takes ``**kwargs``, those of its bases."""
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
    """A neuron's settings, and what its equations imply beyond them, for comparing only.

    The names are those of constructors. ``tau`` is a membrane time constant in time steps, infinite for a neuron that
    does not leak (but GLIF's, which is a parameter). Parameters come as they are, under their own names.
    """
    names = constructor_parameters(type(node), of_bases=True)
    settings = {name: getattr(node, name) for name in names if hasattr(node, name)}
    settings |= {name: value for name, value in node._parameters.items() if value is not None}
    implied: Settings = {"activation": "identity"}
    kind = kind_of(type(node))
    if kind == "IF":
        implied["tau"] = math.inf
        # It adds its input whole.
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
    """The arguments with which a class is built to be, as far as it can, what ``settings`` say."""
    kind, settings = kind_of(cls), dict(settings)
    tau, v_threshold = settings.get("tau"), settings.get("v_threshold")
    if kind == "PLIF":
        settings["init_tau"] = tau
    elif kind == "GLIF":
        # What LIF keeps of its potential in a step is 1 - 1/tau, and what GLIF keeps is its tau.
        if isinstance(tau, float) and tau > 1.0 and leaks(tau):
            settings["init_tau"] = 1.0 - 1.0 / tau
        if isinstance(v_threshold, float) and 0.0 < v_threshold < 1.0:
            settings["init_v_threshold"] = v_threshold
    elif kind == "CLIF":
        settings["store_state_seqs"] = settings.get("store_v_seq", False)
    numbers = {name: value for name, value in settings.items() if not isinstance(value, Tensor)}
    return {name: numbers[name] for name in constructor_parameters(cls) if name in numbers}


def leaks(tau: float) -> bool:
    """Whether a membrane time constant makes any difference to none."""
    return 1.0 + 1.0 / tau != 1.0


def same(name: str, first: object, second: object) -> bool:
    """Whether two settings of this name mean the same; surrogates of one class are copies here."""
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
    """A setting in one line."""
    if isinstance(value, Tensor):
        learned = "learned" if value.requires_grad else "fixed"
        if is_lazy(value):
            return f"{learned}, shape by the first input"
        return f"{value.item():g} ({learned})" if value.ndim == 0 else f"{list(value.shape)} ({learned})"
    return " ".join(repr(value).split())


def snapshot(value: object) -> object:
    """A setting as it is now: a parameter may learn, and a report is of the moment of the swap."""
    if not isinstance(value, Tensor):
        return value
    return show(value) if is_lazy(value) else value.detach().clone().requires_grad_(value.requires_grad)


def plain(value: object) -> object:
    """A setting as JSON has it, or else as text."""
    if isinstance(value, tuple):
        return list(value)
    is_json = (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )
    return value if is_json else show(value)


def _channels(conduct: Tensor) -> int | None:
    return conduct.shape[1] if not is_lazy(conduct) and conduct.ndim == 2 else None
