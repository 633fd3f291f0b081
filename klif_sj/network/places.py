"""Find the places where a network holds its neurons, and put others there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

TORCHS_OWN = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


@dataclass(frozen=True)
class Place:
    """An entry of a dict or a list whose value is a neuron, or a tuple with neurons in it."""

    holder: MutableMapping[Any, Any] | MutableSequence[Any]
    key: Any
    value: Any

    def is_intact(self) -> bool:
        """Whether the value is still there."""
        if isinstance(self.holder, MutableMapping):
            return self.holder.get(self.key) is self.value
        return self.key < len(self.holder) and self.holder[self.key] is self.value

    def put(self, value: Any) -> Place:
        """Put another value there; returns the place with it."""
        self.holder[self.key] = value
        return Place(self.holder, self.key, value)


@dataclass
class Found:
    """A neuron of a network. There is one such object for it, however many places refer to it."""

    neuron: nn.Module
    reference: torch.Tensor | None
    """A floating-point tensor that has the device and the dtype of the neuron."""
    paths: list[str] = field(default_factory=list)
    """The neuron's paths: as in ``named_modules``, or within a plain list or attribute, as Python code refers to it."""
    registered: list[str] = field(default_factory=list)
    """The paths that torch knows, under which the neuron is in the state dict."""


@dataclass
class Survey:
    """The neurons of a network by id, and every place that refers to one."""

    neurons: dict[int, Found] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)
    """By path, why an object was not searched."""

    def places_of(self, chosen: Mapping[int, nn.Module]) -> list[tuple[Place, Any]]:
        """The places that refer to a chosen neuron, each with the value to put there."""
        pairs = ((place, _substitute(place.value, chosen)) for place in self.places)
        return [(place, value) for place, value in pairs if value is not place.value]


def survey(net: nn.Module, is_neuron: Callable[[nn.Module], bool]) -> Survey:
    """Search the registered modules of a network, and the plain attributes, lists, dicts and tuples of each module.

    A neuron in a plain attribute or list is found. Any other module there is not searched, as it may come from outside
    the network, such as a parent of the network.
    """
    result = Survey()
    registered = {id(module) for module in net.modules()}
    recent = next((t for t in _floating_tensors(net, recurse=True)), None)
    visited: set[tuple[int, Any]] = set()

    def note(path: str, neuron: nn.Module, is_registered: bool) -> None:
        own_tensor = next(_floating_tensors(neuron, recurse=True), None)
        entry = result.neurons.setdefault(id(neuron), Found(neuron, recent if own_tensor is None else own_tensor))
        for paths in (entry.paths, *([entry.registered] if is_registered else [])):
            if path not in paths:
                paths.append(path)

    def look(holder: Any, key: Any, path: str, depth: int = 0) -> None:
        """Search one entry of ``holder``. A tuple is one place as a whole, because its entries cannot be replaced."""
        value = holder[key]
        neurons = dict(_neurons_within(value, path, is_neuron))
        for where, neuron in neurons.items():
            note(where, neuron, False)
        if isinstance(value, nn.Module):
            if not is_neuron(value) and id(value) not in registered and any(map(is_neuron, value.modules())):
                result.unseen[path] = (
                    f"{type(value).__name__} is no registered sub-module; its neurons were not looked at"
                )
        elif isinstance(value, list | dict) and depth < 8 and (id(value), None) not in visited:
            visited.add((id(value), None))
            for inner in range(len(value)) if isinstance(value, list) else list(value):
                look(value, inner, f"{path}[{inner!r}]", depth + 1)
        if neurons and (id(holder), key) not in visited:
            visited.add((id(holder), key))
            result.places.append(Place(holder, key, value))

    def walk(module: nn.Module, prefix: str) -> None:
        nonlocal recent
        recent = next(_floating_tensors(module, recurse=False), recent)
        for name, child in module._modules.items():
            path = f"{prefix}{name}"
            if child is None:
                continue
            if is_neuron(child):
                note(path, child, True)
                if (id(module), name) not in visited:
                    visited.add((id(module), name))
                    result.places.append(Place(module._modules, name, child))
            else:
                walk(child, f"{path}.")
        if not isinstance(module, torch.jit.ScriptModule):
            attributes = vars(module)
            for name in [name for name in attributes if name not in TORCHS_OWN]:
                look(attributes, name, f"{prefix}{name}")

    walk(net, "")
    return result


def _neurons_within(value: Any, path: str, is_neuron: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        if is_neuron(value):
            yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _neurons_within(item, f"{path}[{index}]", is_neuron)


def _substitute(value: Any, chosen: Mapping[int, nn.Module]) -> Any:
    if not isinstance(value, tuple):
        return chosen.get(id(value), value)
    items = [_substitute(item, chosen) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return value._make(items) if hasattr(value, "_make") else tuple(items)


def _floating_tensors(module: nn.Module, recurse: bool) -> Iterator[torch.Tensor]:
    for tensors in (module.parameters(recurse), module.buffers(recurse)):
        yield from (tensor for tensor in tensors if tensor.is_floating_point())
