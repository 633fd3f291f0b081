"""Translate one neuron into another, and tell which settings are kept, overridden, dropped, changed or added."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _compat
from ..runtime import unavailable
from .neuron_settings import (
    RUNNING,
    Settings,
    arguments_for,
    constructor_parameters,
    kind_of,
    same,
    settings_of,
    show,
    snapshot,
)

KEPT, OVERRIDDEN, DROPPED, CHANGED, ADDED = WHAT = ("kept", "overridden", "dropped", "changed", "added")

GLIF_LEARNS_ITS_RESET = "GLIF learns its reset, a mix of one to 0 and one by v_subreset, and resets a step later"

WHY_CHANGED = {
    ("GLIF", "tau"): "GLIF's tau is the fraction of the potential that a step keeps; it starts at init_tau",
    ("GLIF", "v_threshold"): "GLIF's threshold is a sigmoid, learned and always below 1",
    ("GLIF", "detach_reset"): "GLIF detaches nothing",
    ("IF", "tau"): "IF does not leak",
}
"""Why a new neuron of this kind has another value of the setting."""

WHY_DROPPED = {
    ("GLIF", "v_reset"): GLIF_LEARNS_ITS_RESET,
    ("GLIF", "decay_input"): "GLIF learns how much of its input it takes, by beta and conduct",
}
"""Why a new neuron of this kind does not have the setting."""

CUTS = {
    "relu": "relu keeps the potential from going below 0 before a reset",
    "celu": "celu flattens a potential below 0, down to -1",
    "leaky_relu": "leaky_relu divides a potential below 0 by 100",
    "identity": "the potential may go below 0",
}

INTERNAL = {"forward_kernel", "backward_kernel", "lava_s_cale", "state_seqs"}
"""Attributes that SpikingJelly's neurons use internally."""


@dataclass(frozen=True)
class Entry:
    """What became of one setting."""

    what: str
    """One of ``'kept'``, ``'overridden'``, ``'dropped'``, ``'changed'``, ``'added'``."""
    name: str
    old: Any = None
    new: Any = None
    why: str = ""
    had: bool = True
    """Whether the old neuron had the setting."""

    def __str__(self) -> str:
        old, new = show(self.old), show(self.new)
        text = {
            KEPT: f"{self.name}={new}",
            OVERRIDDEN: f"{self.name}={new}" + (f" (was {old})" if self.had else ""),
            DROPPED: f"{self.name}={old}",
            CHANGED: f"{self.name}: {old} -> {new}" if old != new else f"{self.name}={new}",
            ADDED: f"{self.name}={new}",
        }[self.what]
        if self.why:
            return f"{text} ({self.why})" if self.what == KEPT else f"{text}: {self.why}"
        return text


def check_overrides(cls: type, overrides: Mapping[str, Any]) -> Settings:
    """The overrides under the names of the constructor's parameters; ``k`` stands for ``init_k``.

    :raises TypeError: for a name that the constructor does not know, suggesting the nearest names
    """
    accepted = constructor_parameters(cls)
    checked = {}
    for name, value in overrides.items():
        known = name if name in accepted else f"init_{name}"
        if known not in accepted:
            nearest = difflib.get_close_matches(name, accepted, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"it has {', '.join(accepted)}"
            raise TypeError(f"{cls.__name__} has no parameter {name!r}; {hint}")
        if name == "surrogate_function" and not callable(value):
            raise TypeError(f"surrogate_function: expected a SpikingJelly surrogate, got {value!r}")
        checked[known] = value
    return checked


def translate(
    old: MemoryModule, cls: type, overrides: Mapping[str, Any], keep: bool = True, like: Tensor | None = None,
    backend: str | None = None,
) -> tuple[MemoryModule, tuple[Entry, ...]]:  # fmt: skip
    """A new neuron with the settings of the old one and the overrides, and what became of every setting.

    :param overrides: as :func:`check_overrides` returns them
    :param keep: False keeps only the settings of how the old neuron runs; the new one computes with its defaults
    :param like: a tensor with the device and the dtype for the new neuron's parameters
    :param backend: the backend that the code asked for, if SpikingJelly's class cannot have it here
    :raises TypeError, ValueError: for settings that the new neuron refuses
    """
    settings, implied = settings_of(old)
    if backend is not None:
        settings["backend"] = backend
    source = settings if keep else {name: settings[name] for name in RUNNING if name in settings}
    arguments = {**_usable(cls, arguments_for(cls, source)), **overrides}
    if "surrogate_function" in arguments:
        arguments["surrogate_function"] = own_surrogate(arguments["surrogate_function"])
    try:
        new = cls(**arguments)
    except (AssertionError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        arguments_text = ", ".join(f"{name}={show(value)}" for name, value in arguments.items())
        raise kind(f"{cls.__name__}({arguments_text}) was refused: {error}; override or skip it") from error
    new.train(old.training)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    if keep and kind_of(cls) == kind_of(type(old)):
        _carry_parameters(old, new, overrides)
    entries = _compare(old, settings, implied, new, overrides, keep)
    return new, tuple(replace(entry, old=snapshot(entry.old), new=snapshot(entry.new)) for entry in entries)


def own_surrogate(function: Any) -> Any:
    """The surrogate itself, or a copy if it has parameters, so that every neuron learns its own."""
    learns = isinstance(function, nn.Module) and any(True for _ in function.parameters())
    return copy.deepcopy(function) if learns else function


def _usable(cls: type, arguments: Settings) -> Settings:
    """The arguments, with a backend that the new neuron's class has and that can serve here."""
    backend = arguments.get("backend")
    if cls.__module__.startswith("spikingjelly."):
        if backend not in (None, "torch", "cupy"):
            del arguments["backend"]
    elif backend and unavailable(backend):
        arguments["backend"] = "auto"
    return arguments


@torch.no_grad()
def _carry_parameters(old: MemoryModule, new: MemoryModule, overrides: Mapping[str, Any]) -> None:
    """Copy the parameters that both neurons have, if their shapes agree and no override says otherwise."""
    for name, new_parameter in new._parameters.items():
        old_parameter = old._parameters.get(name)
        argument = "init_tau" if name == "w" else f"init_{name}"
        if (
            old_parameter is None
            or new_parameter is None
            or is_lazy(old_parameter)
            or is_lazy(new_parameter)
            or old_parameter.shape != new_parameter.shape
        ):
            continue
        if argument not in overrides:
            new_parameter.copy_(old_parameter)
        if not overrides.keys() & {"learn_k", "learn_gates", "learn_membrane"}:
            new_parameter.requires_grad_(old_parameter.requires_grad)


def _compare(
    old: MemoryModule,
    old_settings: Settings,
    old_implied: Settings,
    new: MemoryModule,
    overrides: Mapping[str, Any],
    keep: bool,
) -> Iterator[Entry]:
    """Entries for every setting of the old neuron, and for the settings that only the new one has."""
    new_settings, new_implied = settings_of(new)
    before, after = {**old_implied, **old_settings}, {**new_implied, **new_settings}
    kind, cls = kind_of(type(new)), type(new).__name__
    overridden = {name if name in after else name.removeprefix("init_") for name in overrides}
    for name, value in before.items():
        if name in overridden and name in after:
            yield Entry(OVERRIDDEN, name, value, after[name], had=name in old_settings)
        elif name not in after:
            if name in old_settings:
                yield Entry(DROPPED, name, value, why=WHY_DROPPED.get((kind, name), f"{cls} has no {name}"))
        elif not same(name, value, after[name]):
            yield Entry(CHANGED, name, value, after[name], _why_changed(name, value, new, keep))
        elif name in old_settings:
            yield Entry(KEPT, name, value, after[name], _hint(name, value, old, new))
    for name, value in after.items():
        if name not in before and name in new_settings:
            yield Entry(OVERRIDDEN if name in overridden else ADDED, name, None, value, had=False)
    yield Entry(KEPT, "training", old.training, new.training)
    for parameter in [*new.parameters()][:1]:
        yield Entry(KEPT, "device", str(parameter.device), str(parameter.device))
        yield Entry(KEPT, "dtype", str(parameter.dtype), str(parameter.dtype))
    yield from _meaning(old, before, new, after)
    yield from _left_behind(old, old_settings, new)


def _why_changed(name: str, value: object, new: MemoryModule, keep: bool) -> str:
    kind, cls = kind_of(type(new)), type(new).__name__
    if (kind, name) in WHY_CHANGED:
        return WHY_CHANGED[kind, name]
    if not keep and name not in RUNNING:
        return f"keep=False: {cls}'s own default"
    if name == "activation":
        return CUTS[str(settings_of(new)[0].get("activation", "identity"))]
    if isinstance(value, Tensor):
        return f"the old neuron's is a parameter, {cls} has a number of its own"
    if name == "tau" and value == math.inf:
        return f"the old neuron did not leak, {cls} does"
    if name == "backend":
        return f"{value!r} cannot serve here" if new.backend == "auto" else f"{cls} cannot take it"
    if name == "learn_tau":
        return f"the value learned so far is kept; {cls} does not learn it further" if value else f"{cls} learns it"
    return f"{cls} cannot take it"


def _hint(name: str, value: object, old: MemoryModule, new: MemoryModule) -> str:
    if name == "decay_input" and kind_of(type(old)) == "IF":
        return "as IF adds its input whole"
    if name == "backend" and value == "torch" and "auto" in getattr(new, "supported_backends", ()):
        return "override with backend='auto' for the generated kernels"
    return ""


def _meaning(old: MemoryModule, before: Settings, new: MemoryModule, after: Settings) -> Iterator[Entry]:
    """Entries for settings and states that mean something else in the new neuron's equations."""
    v_reset, kinds = after.get("v_reset"), (kind_of(type(old)), kind_of(type(new)))
    activation = after.get("activation", "identity")
    if v_reset is not None and v_reset < 0 and before.get("activation") != activation != "identity":
        why = f"a reset to below 0 lasts until the next step, as {CUTS[activation]}"
        yield Entry(CHANGED, "v_reset", before.get("v_reset"), v_reset, why)
    if kinds == ("GLIF", "GLIF") and not hasattr(old, "spike"):
        why = "the last spike resets the potential in the next call too; the old neuron forgot it between calls"
        yield Entry(CHANGED, "spike", "forgotten", "carried", why)
    if kinds[0] == "CLIF" != kinds[1]:
        yield Entry(DROPPED, "m", "state", why=f"{type(new).__name__}'s reset does not remember earlier spikes")
    bounds, k = after.get("k_bounds"), after.get("k")
    if bounds and isinstance(k, Tensor) and not bounds[0] <= k.item() <= bounds[1]:
        yield Entry(CHANGED, "k", before.get("k"), k, f"acts as the nearer of its bounds {bounds}")


def _left_behind(old: MemoryModule, settings: Settings, new: MemoryModule) -> Iterator[Entry]:
    """Entries for everything else that the old neuron holds and the new one does not get."""
    cls = type(new).__name__
    states = [name for name, value in old.named_memories() if isinstance(value, Tensor)]
    if states:
        yield Entry(DROPPED, "state", ", ".join(states), why=f"{cls} starts from its reset values")
    if _compat.kernel_precision(old) is not None:
        why = f"{cls} computes in float32, float64 for float64 input"
        yield Entry(DROPPED, "precision", _compat.kernel_precision(old), why=why)
    why_attribute = "set on the old neuron from outside; set it on the new one if anything reads it"
    attributes = {**vars(old), **old._modules, **old._buffers}
    for name, value in attributes.items():
        if not (name.startswith("_") or value is None or name in settings or name in INTERNAL or hasattr(new, name)):
            yield Entry(DROPPED, name, value, why=why_attribute)
