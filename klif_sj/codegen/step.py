"""The step of a neuron, as a value: traced once for each set of equations, and found again by what the trace read."""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .program import Parameter, Program, build_program
from .scope import Effective, Reads, Scope
from .trace import StepTraceError

Equations = Callable[[Any, Tensor], Tensor]
"""One step of a neuron: takes ``self``, or a stand-in for it, and x; sets the states; returns the spike."""

Kind = tuple[str, bool, bool, bool]
"""A parameter's name, and whether it is per step, per channel, and learned: the fields of ``Parameter``."""


@dataclass(frozen=True)
class NeuronStep:
    """A program, the tensors of the neuron that it takes, and the settings that it depends on.

    :param raw: by the program's name, the dotted names of parameters and buffers that the neuron itself has
    :param settings: numbers and strings that the step read, by dotted name
    """

    program: Program
    raw: Mapping[str, str]
    settings: tuple[tuple[str, Any], ...]


@dataclass
class _Traced:
    """The steps of neurons for which the same reads hold, by the dtype, the kinds of parameters and the direction."""

    reads: Reads
    steps: dict[Any, tuple[NeuronStep, Callable[[Any], Any] | None, tuple[Any, ...]]] = field(default_factory=dict)


_of_node: weakref.WeakKeyDictionary[Any, _Traced] = weakref.WeakKeyDictionary()
_of_class: weakref.WeakKeyDictionary[type, list[_Traced]] = weakref.WeakKeyDictionary()
_adding = threading.Lock()


def step_of(
    node: nn.Module, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    backward: bool,
) -> NeuronStep:  # fmt: skip
    """The step of a neuron with effective parameters of these kinds.

    It is traced where nothing that was traced before still holds: a setting that was read has changed, be it an
    attribute, a method or a global, or a parameter is of another kind.

    :raises StepTraceError: naming what no kernel can express and the line that it came from
    """
    gradients = torch.is_grad_enabled()
    asked = effective, dtype, backward, gradients
    traced = _of_node.get(node)
    if traced is None or not traced.reads.hold(node):
        candidates = _of_class.get(type(node), ())
        traced = next((candidate for candidate in candidates if candidate.reads.hold(node)), None)
        if traced is not None:
            _of_node[node] = traced
    if traced is not None:
        known = traced.steps.get(asked)
        if known is not None and _has_kinds(node, known[1], known[2]):
            return known[0]
    reads = Reads()
    step, kinds = _trace(node, tuple(states), equations, effective, dtype, backward, reads)
    names = tuple(step.raw.values())
    entry = step, attrgetter(*names, names[0]) if names else None, kinds
    with _adding:
        if traced is None:
            traced = _of_node[node] = _Traced(reads)
            _of_class.setdefault(type(node), []).append(traced)
        traced.steps[asked] = entry
    return step


def _has_kinds(node: Any, read: Callable[[Any], Any] | None, kinds: tuple[Any, ...]) -> bool:
    """Whether the tensors that a step takes from the neuron itself are what they were when it was traced."""
    if read is None:
        return True
    try:
        return kinds == tuple(map(_kind_of, read(node)))
    except AttributeError:
        return False


def _kind_of(tensor: Any) -> Any:
    return (tensor.shape, tensor.requires_grad) if isinstance(tensor, Tensor) else tensor


def _trace(
    node: Any, states: tuple[str, ...], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    backward: bool, reads: Reads,
) -> tuple[NeuronStep, tuple[Any, ...]]:  # fmt: skip
    given = {kind[0] for kind in effective}
    scalars = raw_scalars(node)
    raw = {f"raw_{name}" if name in given else name: name for name in scalars}
    gradients = torch.is_grad_enabled()
    parameters = [Parameter(*kind) for kind in effective]
    parameters += [Parameter(n, learned=gradients and scalars[raw[n]].requires_grad) for n in raw]

    def step(x: Tensor, held: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        present: dict[str, Any] = {raw[name]: value for name, value in values.items() if name in raw}
        present |= {**held, "effective": Effective({name: values[name] for name in given})}
        spike = equations(Scope(node, present, states, reads), x)
        reads.refuse_side_effects()
        return spike, {name: _as_tensor(present[name], x) for name in states}

    program = build_program(_title(node), step, states, parameters, dtype, backward)
    used = {p.name: raw[p.name] for p in program.parameters if p.name in raw}
    names = tuple(used.values())
    kinds = tuple(_kind_of(scalars[name]) for name in (*names, *names[:1]))
    return NeuronStep(program, used, tuple(reads.constants())), kinds


def _as_tensor(value: Any, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(x, value)


_UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)


def raw_scalars(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """One-element parameters and buffers of a neuron and its submodules (a surrogate's, say) by dotted name."""
    found = {}
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and type(tensor) not in _UNINITIALIZED and tensor.numel() == 1:
                found[prefix + name] = tensor
    for name, child in module._modules.items():
        if child is not None:
            found.update(raw_scalars(child, f"{prefix}{name}."))
    return found


def _title(node: nn.Module) -> str:
    """The neuron on one line, without what makes no difference to its equations, such as where an object lies."""
    surrogate = getattr(node, "surrogate_function", None)
    settings = ", ".join(
        part for part in node.extra_repr().split(", ") if not part.startswith(("step_mode", "backend"))
    )
    title = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(node).__name__}({settings}) with {surrogate}")
    return " ".join(title.split())
