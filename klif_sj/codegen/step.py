"""The step of a neuron, as a value: traced once for each set of equations, and found again by what the trace read."""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .program import Parameter, Program, build_program
from .scope import Effective, Reads, Scope
from .trace import OutsideJitTrace

Equations = Callable[[Any, Tensor], Tensor]
"""One step of a neuron: takes ``self``, or a stand-in for it, and x; sets the states; returns the spike."""

Kind = tuple[str, bool, bool, bool]
"""A parameter's name, and whether it is per step, per channel, and learned: the fields of ``Parameter``."""


@dataclass(frozen=True)
class NeuronStep:
    """A program, the tensors of the neuron itself that it takes, by name, and the settings that it depends on.

    :param paths: where the neuron has those tensors, by name
    :param settings: numbers and strings that the step read, by dotted name
    """

    program: Program
    tensors: dict[str, Tensor]
    paths: dict[str, str]
    settings: list[tuple[str, Any]]


@dataclass
class _Traced:
    """The programs of neurons for which the same reads hold, by the dtype, the kinds of parameters and the direction.

    :param paths: the neuron's own tensors that the step reads, by dotted name
    """

    reads: Reads
    paths: tuple[str, ...]
    programs: dict[Any, tuple[Program, dict[str, str]]] = field(default_factory=dict)

    @functools.cached_property
    def _read(self) -> Callable[[Any], tuple[Tensor, ...]]:
        return attrgetter(*self.paths, *self.paths[:1]) if self.paths else lambda node: ()

    def tensors_of(self, node: nn.Module) -> dict[str, Tensor] | None:
        """The tensors that the step reads, by path; None where the neuron has no such tensor any more."""
        try:
            found = dict(zip(self.paths, self._read(node), strict=False))
        except AttributeError:
            return None
        return found if all(isinstance(tensor, Tensor) for tensor in found.values()) else None


_of_node: weakref.WeakKeyDictionary[Any, _Traced] = weakref.WeakKeyDictionary()
_of_class: weakref.WeakKeyDictionary[type, list[_Traced]] = weakref.WeakKeyDictionary()
_adding = threading.Lock()


def step_of(
    node: nn.Module, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    needs_grad: bool,
) -> NeuronStep:  # fmt: skip
    """The step of a neuron with effective parameters of these kinds.

    It is traced where nothing that was traced before still holds: a setting that was read has changed, be it an
    attribute, a method or a global, or a parameter is of another kind.

    :param needs_grad: whether a gradient is wanted already, without one for the neuron's own tensors

    :raises StepTraceError: naming what no kernel can express and the line that it came from
    """
    if torch._C._get_tracing_state() is not None:
        # With a gradient whether or not one is wanted: torch checks a trace by another one that wants none.
        with OutsideJitTrace(), torch.enable_grad():
            return step_of(node, states, equations, effective, dtype, True)
    traced = _find(node)
    tensors = traced.tensors_of(node) if traced else None
    if traced is None or tensors is None:
        traced, tensors = _add(node, states, equations, effective, dtype, needs_grad)
    asked = _asked(effective, dtype, needs_grad, tensors)
    if asked not in traced.programs:
        traced.programs[asked] = _trace(node, states, equations, effective, dtype, asked.backward, Reads())
    program, paths = traced.programs[asked]
    taken = {name: tensors[path] for name, path in paths.items()}
    return NeuronStep(program, taken, paths, traced.reads.constants())


class _Asked(NamedTuple):
    """What tells the programs apart that the same reads give."""

    effective: tuple[Kind, ...]
    dtype: torch.dtype
    backward: bool
    own: tuple[Any, ...]


def _asked(effective: tuple[Kind, ...], dtype: torch.dtype, needs_grad: bool, own: Mapping[str, Tensor]) -> _Asked:
    gradients = torch.is_grad_enabled()
    kinds = tuple((tensor.shape, gradients and tensor.requires_grad) for tensor in own.values())
    return _Asked(effective, dtype, needs_grad or any(learned for _, learned in kinds), kinds)


def _add(
    node: nn.Module, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[_Traced, dict[str, Tensor]]:  # fmt: skip
    """Trace a neuron for the first time, to know what it reads."""
    backward = needs_grad or torch.is_grad_enabled() and any(t.requires_grad for t in raw_scalars(node).values())
    reads = Reads()
    found = _trace(node, states, equations, effective, dtype, backward, reads)
    traced = _Traced(reads, tuple(reads.tensors))
    tensors = traced.tensors_of(node) or {}
    asked = _asked(effective, dtype, needs_grad, tensors)
    if asked.backward == backward:
        traced.programs[asked] = found
    with _adding:
        _of_class.setdefault(type(node), []).append(traced)
        _of_node[node] = traced
    return traced, tensors


def _find(node: nn.Module) -> _Traced | None:
    """What was traced of this neuron, or of another one of its class, and still holds."""
    traced = _of_node.get(node)
    if traced is not None and traced.reads.hold(node):
        return traced
    for traced in _of_class.get(type(node), ()):
        if traced.reads.hold(node):
            _of_node[node] = traced
            return traced
    return None


def _trace(
    node: Any, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    backward: bool, reads: Reads,
) -> tuple[Program, dict[str, str]]:  # fmt: skip
    """A program, and the paths of the neuron's own tensors that it takes, by name."""
    given = {kind[0] for kind in effective}
    scalars = raw_scalars(node)
    paths = {f"raw_{path}" if path in given else path: path for path in scalars}
    gradients = torch.is_grad_enabled()
    parameters = [Parameter(*kind) for kind in effective]
    parameters += [Parameter(n, learned=gradients and scalars[paths[n]].requires_grad) for n in paths]

    def step(x: Tensor, held: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        present: dict[str, Any] = {paths[name]: value for name, value in values.items() if name in paths}
        present |= {**held, "effective": Effective({name: values[name] for name in given})}
        spike = equations(Scope(node, present, tuple(states), reads), x)
        reads.refuse_side_effects()
        return spike, {name: _as_tensor(present[name], x) for name in states}

    program = build_program(_title(node), step, states, parameters, dtype, backward)
    return program, {p.name: paths[p.name] for p in program.parameters if p.name in paths}


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
