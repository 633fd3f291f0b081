"""The step of a neuron, as a value: traced once for each set of equations, and found again by what the trace read."""

from __future__ import annotations

import contextlib
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

from .hoist import Hoisting, Prologue
from .program import Parameter, Program, build_program, own_name
from .scope import Effective, Reads, Scope
from .trace import OutsideJitTrace, PlainTorch, Step, StepTraceError, trace_forward

Equations = Callable[[Any, Tensor], Tensor]
"""One step of a neuron: takes ``self``, or a stand-in for it, and x; sets the states; returns the spike."""

Kind = tuple[str, bool, bool, bool, bool]
"""A parameter's name, and whether it is per step, per channel, learned, and prepared: the fields of ``Parameter``."""

Computation = Callable[[Any], Mapping[str, tuple[Tensor, bool]]]
"""The effective parameters of ``self``, or a stand-in for it, and whether each has a value for every step."""


@dataclass(frozen=True)
class NeuronStep:
    """A program, the tensors of the neuron itself that it takes, by name, and the settings that it depends on.

    :param tensors: of one element
    :param prologue: what gives the others, which may have any shape that broadcasts against a step; None where the
        program takes no others
    :param own: the neuron's tensors that the prologue starts from, by path
    :param paths: where the neuron has those tensors, by name
    :param settings: numbers and strings that the step read, by dotted name
    """

    program: Program
    tensors: dict[str, Tensor]
    paths: dict[str, str]
    settings: list[tuple[str, Any]]
    prologue: Prologue | None = None
    own: dict[str, Tensor] = field(default_factory=dict)

    def shaped(self) -> dict[str, Tensor]:
        """The parameters that are not the neuron's own numbers, computed anew, by name."""
        if self.prologue is None:
            return {}
        found = self.prologue.run(self.own)
        return {name: found[name] for name in self.program.names if name in found}


class _Found(NamedTuple):
    """A program, the paths of the neuron's own numbers that it takes, by name, what gives its other parameters, and
    what its trace read."""

    program: Program
    paths: dict[str, str]
    prologue: Prologue | None
    reads: Reads


@dataclass
class _Traced:
    """The programs of neurons for which the same reads hold, by the dtype, the kinds of parameters and the direction.

    :param paths: the neuron's own tensors that the step reads, by dotted name
    """

    reads: Reads
    paths: tuple[str, ...]
    programs: dict[Any, _Found] = field(default_factory=dict)

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
_of_class: weakref.WeakKeyDictionary[type, tuple[_Traced, ...]] = weakref.WeakKeyDictionary()
_adding = threading.Lock()

REMEMBERED = 64
"""How many steps of a class are remembered, the latest: a setting that changes in every epoch makes new ones."""


def step_of(
    node: nn.Module, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    needs_grad: bool, sources: Sources | None = None,
) -> NeuronStep:  # fmt: skip
    """The step of a neuron with effective parameters of these kinds.

    It is traced where nothing that was traced before still holds: a setting that was read has changed, be it an
    attribute, a method or a global, or a parameter is of another kind.

    :param needs_grad: whether a gradient is wanted already, without one for the neuron's own tensors
    :param sources: of the effective parameters that are computed in the kernel

    :raises StepTraceError: naming what no kernel can express and the line that it came from
    """
    if torch._C._get_tracing_state() is not None:
        # With a gradient whether or not one is wanted: torch checks a trace by another one that wants none.
        with OutsideJitTrace(), torch.enable_grad():
            return _step_of(node, states, equations, effective, dtype, True, sources)
    return _step_of(node, states, equations, effective, dtype, needs_grad, sources)


def _step_of(
    node: nn.Module, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    needs_grad: bool, sources: Sources | None,
) -> NeuronStep:  # fmt: skip
    traced = _find(_of_node, _of_class, node)
    tensors = traced.tensors_of(node) if traced else None
    if traced is None or tensors is None:
        traced, tensors = _add(node, states, equations, effective, dtype, needs_grad, sources)
    asked = _asked(effective, dtype, needs_grad, tensors, sources)
    if asked not in traced.programs:
        traced.programs[asked] = _trace(node, states, equations, effective, dtype, asked.backward, sources)
    program, paths, prologue, _ = traced.programs[asked]
    taken = {name: tensors[path] for name, path in paths.items()}
    return NeuronStep(program, taken, paths, traced.reads.constants, prologue, tensors if prologue else {})


@dataclass(eq=False)
class Sources:
    """Where a neuron has its own parameters from which the effective ones are computed, one from one.

    :param paths: by the effective parameter's name, where the own one is, and whether it has a value for every step;
        empty where the computation is of another form, so that no kernel can do it
    """

    compute: Computation
    reads: Reads
    paths: dict[str, tuple[str, bool]]


_sources_of_node: weakref.WeakKeyDictionary[Any, Sources] = weakref.WeakKeyDictionary()
_sources_of_class: weakref.WeakKeyDictionary[type, tuple[Sources, ...]] = weakref.WeakKeyDictionary()


def sources_of(node: nn.Module, compute: Computation) -> Sources:
    """What the effective parameters of a neuron are computed from, as far as a kernel can compute them."""
    known: Sources | None = _sources_of_node.get(node)
    if known is not None and not known.paths:
        return known  # to compute them outside of the kernel is right whatever has changed
    known = _find(_sources_of_node, _sources_of_class, node)
    if known is None:
        known = Sources(compute, Reads(), {})
        with contextlib.suppress(StepTraceError, AttributeError, RuntimeError, TypeError, ValueError):
            known.paths = _trace_sources(node, compute, known.reads)
        _remember(_sources_of_node, _sources_of_class, node, known)
    return known


def _trace_sources(node: Any, compute: Computation, reads: Reads) -> dict[str, tuple[str, bool]]:
    own = {path: own_name(path) for path, _ in node.named_parameters()}
    per_step: dict[str, bool] = {}

    def effective(x: Tensor, held: Any, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        found = _computed(node, compute, {path: values[name] for path, name in own.items()}, reads)
        per_step.update({name: stepwise for name, (_, stepwise) in found.items()})
        return x, {name: value for name, (value, _) in found.items()}

    with PlainTorch():
        names = list(compute(node))
        graph = trace_forward(effective, names, list(own.values()), torch.float32)
    paths = {}
    for name in names:
        (*used,) = graph.giving([name]).used_inputs()
        if len(used) != 1 or used[0] not in own.values():
            return {}
        paths[name] = used[0].removeprefix(own_name("")), per_step[name]
    return paths if graph.operations else {}  # own parameters that are taken as they are need no computation


def _computed(
    node: Any, compute: Computation, own: Mapping[str, Tensor], reads: Reads
) -> Mapping[str, tuple[Tensor, bool]]:
    found = compute(Scope(node, dict(own), (), reads))
    reads.refuse_side_effects()
    return found


class _Asked(NamedTuple):
    """What tells the programs apart that the same reads give."""

    effective: tuple[Kind, ...]
    dtype: torch.dtype
    backward: bool
    own: tuple[Any, ...]
    sources: Sources | None


def _asked(
    effective: tuple[Kind, ...], dtype: torch.dtype, needs_grad: bool, own: Mapping[str, Tensor],
    sources: Sources | None,
) -> _Asked:  # fmt: skip
    gradients = torch.is_grad_enabled()
    kinds = tuple((tensor.shape, gradients and tensor.requires_grad) for tensor in own.values())
    return _Asked(effective, dtype, needs_grad or any(learned for _, learned in kinds), kinds, sources)


def _add(
    node: nn.Module, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    needs_grad: bool, sources: Sources | None,
) -> tuple[_Traced, dict[str, Tensor]]:  # fmt: skip
    """Trace a neuron for the first time, to know what it reads."""
    backward = needs_grad or torch.is_grad_enabled() and any(t.requires_grad for t in raw_tensors(node).values())
    found = _trace(node, states, equations, effective, dtype, backward, sources)
    traced = _Traced(found.reads, tuple(found.reads.tensors))
    tensors = traced.tensors_of(node) or {}
    asked = _asked(effective, dtype, needs_grad, tensors, sources)
    if asked.backward == backward:
        traced.programs[asked] = found
    _remember(_of_node, _of_class, node, traced)
    return traced, tensors


def _remember(of_node: Any, of_class: Any, node: nn.Module, found: Any) -> None:
    """Keep what was traced for this neuron and, as one of the latest, for those of its class."""
    with _adding:
        of_class[type(node)] = (*of_class.get(type(node), ())[1 - REMEMBERED :], found)
        of_node[node] = found


def _find(of_node: Any, of_class: Any, node: nn.Module) -> Any:
    """What was traced of this neuron, or of another one of its class, and still holds."""
    found = of_node.get(node)
    if found is not None and found.reads.hold(node):
        return found
    for found in of_class.get(type(node), ()):
        if found.reads.hold(node):
            of_node[node] = found
            return found
    return None


def _trace(
    node: Any, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    backward: bool, sources: Sources | None,
) -> _Found:  # fmt: skip
    """A program and its parameters: tensors of one element as numbers of the step, others by a prologue.

    Where that fails, as for a tensor of one element that is indexed or viewed as a channel, all are of the prologue.
    """
    tensors = raw_tensors(node)
    numbers = {path: tensor for path, tensor in tensors.items() if tensor.numel() == 1}
    shaped = {path: tensor for path, tensor in tensors.items() if path not in numbers}
    rest = node, states, equations, effective, dtype, backward, sources
    try:
        return _trace_with(numbers, shaped, *rest)
    except StepTraceError:
        if not numbers:
            raise
        try:
            return _trace_with({}, tensors, *rest)
        except StepTraceError:
            pass
        raise


def _trace_with(
    numbers: Mapping[str, Tensor], shaped: Mapping[str, Tensor], node: Any, states: Sequence[str],
    equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype, backward: bool,
    sources: Sources | None,
) -> _Found:  # fmt: skip
    reads = Reads()
    given = {kind[0] for kind in effective}
    paths = {f"raw_{path}" if path in given else path: path for path in numbers}
    gradients = torch.is_grad_enabled()
    parameters = [Parameter(*kind) for kind in effective]
    parameters += [Parameter(n, learned=gradients and numbers[paths[n]].requires_grad) for n in paths]

    def step(
        x: Tensor,
        held: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        hoisting: Hoisting | None = None,
        reads: Reads = reads,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        present: dict[str, Any] = {paths[name]: value for name, value in values.items() if name in paths}
        present |= {**shaped, **held, "effective": Effective({name: values[name] for name in given})}
        scope = Scope(node, present, tuple(states), reads)
        if shaped:
            with torch._C._EnableTorchFunction(), hoisting or Hoisting(shaped, given, values):
                spike = equations(scope, x)
        else:
            spike = equations(scope, x)
        reads.refuse_side_effects()
        return spike, {name: _as_tensor(present[name], x) for name in states}

    prologue = None
    if shaped:
        hoisting = Hoisting(shaped, given)
        with (
            PlainTorch(),
            torch.set_grad_enabled(gradients),
            torch.random.fork_rng(devices=[]),
            contextlib.suppress(Exception),
        ):
            half = {name: torch.full((), 0.5, dtype=dtype) for name in ("x", *states, *given, *paths)}
            step(half["x"], {name: half[name] for name in states}, half, hoisting, Reads())
        prologue = hoisting.prologue() if hoisting.taken() else None
        parameters += [
            Parameter(name, per_channel=tensor.numel() != 1, learned=tensor.requires_grad)
            for name, tensor in hoisting.taken().items()
        ]
    program = build_program(
        _title(node), step, states, parameters, dtype, backward, _preparation(node, sources) if sources else None
    )
    return _Found(program, {p.name: paths[p.name] for p in program.parameters if p.name in paths}, prologue, reads)


def _preparation(node: Any, sources: Sources) -> Step:
    """What computes the effective parameters, as if they were states, from the neuron's own."""

    def prepare(x: Tensor, held: Any, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        own = {path: values[own_name(name)] for name, (path, _) in sources.paths.items()}
        found = _computed(node, sources.compute, own, Reads())
        return x, {name: value for name, (value, _) in found.items()}

    return prepare


def _as_tensor(value: Any, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(x, value)


_UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)


def raw_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a neuron and its submodules (a surrogate's, say) by dotted name."""
    found = {}
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and type(tensor) not in _UNINITIALIZED:
                found[prefix + name] = tensor
    for name, child in module._modules.items():
        if child is not None:
            found.update(raw_tensors(child, f"{prefix}{name}."))
    return found


def _title(node: nn.Module) -> str:
    """The neuron on one line, without what makes no difference to its equations, such as where an object lies."""
    surrogate = getattr(node, "surrogate_function", None)
    settings = ", ".join(
        part for part in node.extra_repr().split(", ") if not part.startswith(("step_mode", "backend"))
    )
    title = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(node).__name__}({settings}) with {surrogate}")
    return " ".join(title.split())
