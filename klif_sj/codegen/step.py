"""The step of a neuron: traced once for each set of equations, and used again while what the trace read still holds."""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .hoist import Guard, Hoisting, Prologue
from .program import Parameter, Program, build_program, own_name, prepared_texts
from .scope import Effective, Reads, Scope
from .trace import OutsideJitTrace, PlainTorch, Step, StepTraceError, trace_forward

Equations = Callable[[Any, Tensor], Tensor]
"""One step of a neuron: a function of ``self``, or a stand-in for it, and x that sets states and returns the spike."""

Kind = tuple[str, bool, bool, bool, bool]
"""A parameter's name, and whether it is per step, per channel, learned, and prepared: the fields of ``Parameter``."""


class PerStep(NamedTuple):
    """An effective parameter with one value for each time step, time first: ``[T]`` or ``[T, C]``."""

    values: Tensor


EffectiveParameters = dict[str, Tensor | PerStep]

Computation = Callable[[Any], EffectiveParameters]
"""A function that computes the effective parameters of ``self``, or of a stand-in for it."""


Find = Callable[[Any], tuple[Tensor, ...] | None]
"""A function that returns a neuron's tensors that a trace read, or None if anything else that it read has changed."""


@dataclass(frozen=True, eq=False)
class NeuronStep:
    """A program, and where those of its parameters come from that are not effective parameters.

    :param reads: what the trace read. The tensors of the neuron among it are the step's own tensors.
    :param taken: by a parameter's name, the position of the own tensor of one element that it is
    :param prologue: computes parameters of other shapes, which broadcast against a step, from own tensors
    """

    program: Program
    reads: Reads
    taken: dict[str, int]
    prologue: Prologue | None

    @property
    def own(self) -> tuple[str, ...]:
        """The paths of the own tensors."""
        return tuple(self.reads.tensors)

    def with_reads(self, reads: Reads) -> NeuronStep:
        """The same step, whose own tensors are in another order, and perhaps more."""
        before, paths = self.own, tuple(reads.tensors)
        taken = {name: paths.index(before[position]) for name, position in self.taken.items()}
        return replace(self, reads=reads, taken=taken)

    def parameters(self, own: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parameters that come from the neuron's own tensors, by name."""
        by_name = {name: own[position] for name, position in self.taken.items()}
        if self.prologue is not None:
            computed = self.prologue.run(dict(zip(self.reads.tensors, own, strict=True)))
            by_name |= {name: computed[name] for name in self.program.names if name in computed}
        return by_name


@dataclass
class _Traced:
    """The steps of neurons for which the same reads hold, by all that distinguishes their programs."""

    reads: Reads
    steps: dict[Any, NeuronStep] = field(default_factory=dict)


_of_node: weakref.WeakKeyDictionary[Any, _Traced] = weakref.WeakKeyDictionary()
_of_class: weakref.WeakKeyDictionary[type, tuple[_Traced, ...]] = weakref.WeakKeyDictionary()
_adding = threading.Lock()

REMEMBERED = 64
"""How many of a class's latest traces are remembered: a setting that changes in every epoch makes new ones."""


def step_of(
    node: nn.Module, equations: Callable[[], Equations], states: Sequence[str], effective: tuple[Kind, ...],
    dtype: torch.dtype, needs_grad: bool, sources: Sources | None = None,
) -> tuple[NeuronStep, tuple[Tensor, ...]]:  # fmt: skip
    """The step of a neuron with effective parameters of these kinds, and the neuron's tensors that it reads.

    The step is traced if no earlier trace still holds, because a setting that was read (an attribute, a method or a
    global) has changed, or because a parameter is of another kind.

    :param equations: returns the equations; it is called only if the step must be traced
    :param needs_grad: whether a gradient is needed even if none of the neuron's own tensors needs one
    :param sources: the sources of the effective parameters that the kernel computes; None if it computes none
    :raises StepTraceError: naming what no kernel can express and the line that it came from
    """
    if torch._C._get_tracing_state() is not None:
        # The step always has a gradient here, because torch checks a trace by a second one that needs no gradient.
        with OutsideJitTrace(), torch.enable_grad():
            return step_of(node, equations, states, effective, dtype, True, sources)
    traced, own = _find(_of_node, _of_class, node)
    gradients, new_step, backward = torch.is_grad_enabled(), None, needs_grad
    if own is None:
        backward = needs_grad or gradients and any(t.requires_grad for t in raw_tensors(node).values())
        new_step = _trace(node, states, equations(), effective, dtype, backward, sources)
        traced, own = _Traced(new_step.reads), new_step.reads.find(node)
        if own is None:
            raise StepTraceError(f"{type(node).__name__}: what its step reads changes while it is read")
        _remember(_of_node, _of_class, node, traced)
    key: tuple[Any, ...] = (effective, dtype, sources)
    for tensor in own:
        learned = gradients and tensor.requires_grad
        key, needs_grad = (*key, tensor.shape, learned), needs_grad or learned
    key = (*key, needs_grad)
    step = traced.steps.get(key)
    if step is None and new_step is not None and backward == needs_grad:
        step = traced.steps.setdefault(key, new_step)
    if step is None:
        step = _trace(node, states, equations(), effective, dtype, needs_grad, sources)
        if set(step.own) - set(traced.reads.tensors):
            raise StepTraceError(
                f"{type(node).__name__}: its step reads {', '.join(step.own)} for some dtypes or gradients, and "
                f"{', '.join(traced.reads.tensors) or 'no parameter'} for others; read the same in all"
            )
        step = traced.steps.setdefault(key, step.with_reads(traced.reads))
    return step, own


@dataclass(eq=False)
class Sources:
    """The neuron's own parameters from which a kernel computes the effective ones, each from a single one.

    :param positions: by an effective parameter's name, the position of the neuron's own one among the tensors that were
        read, and whether it has a value for every step. It is empty if the computation has another form, which no
        kernel can do.
    """

    compute: Computation
    reads: Reads
    positions: dict[str, tuple[int, bool]]


_sources_of_node: weakref.WeakKeyDictionary[Any, Sources] = weakref.WeakKeyDictionary()
_sources_of_class: weakref.WeakKeyDictionary[type, tuple[Sources, ...]] = weakref.WeakKeyDictionary()


def sources_of(node: nn.Module, compute: Computation, dtype: torch.dtype) -> tuple[Sources, EffectiveParameters] | None:
    """The sources of a neuron's effective parameters, and the neuron's own parameters under the effective ones' names.

    None if no kernel can compute the effective parameters in the arithmetic's dtype.
    """
    known: Sources | None = _sources_of_node.get(node)
    if known is not None and not known.positions:
        return None  # computing them outside of the kernel is right whatever has changed
    known, own = _find(_sources_of_node, _sources_of_class, node)
    if own is None:
        reads = Reads()
        positions: dict[str, tuple[int, bool]] = {}
        with contextlib.suppress(Exception):  # outside of the kernel, the computation raises it again
            positions = _trace_sources(node, compute, reads)
        known, own = Sources(compute, reads, positions), reads.find(node) if positions else ()
        _remember(_sources_of_node, _sources_of_class, node, known)
    if not known.positions or own is None:
        return None
    for tensor in own:
        if tensor.dtype != dtype:
            return None
    parameters: EffectiveParameters = {}
    for name, (position, per_step) in known.positions.items():
        parameters[name] = PerStep(own[position]) if per_step else own[position]
    return known, parameters


def _trace_sources(node: nn.Module, compute: Computation, reads: Reads) -> dict[str, tuple[int, bool]]:
    own = {path: own_name(path) for path, _ in node.named_parameters()}
    per_step: dict[str, bool] = {}

    def effective(x: Tensor, held: Any, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        computed = _computed(node, compute, {path: values[name] for path, name in own.items()}, reads)
        per_step.update({name: isinstance(value, PerStep) for name, value in computed.items()})
        return x, _values(computed)

    with PlainTorch():
        trace_forward(effective, (), list(own.values()), torch.float32)  # this run tells the names
        graph = trace_forward(effective, list(per_step), list(own.values()), torch.float32)
        positions, paths = {}, list(reads.tensors)
        for name in per_step:
            (*used,) = graph.giving([name]).used_inputs()
            if len(used) != 1 or used[0] not in own.values():
                return {}
            positions[name] = paths.index(used[0].removeprefix(own_name(""))), per_step[name]
        if not graph.operations:
            return {}  # own parameters that are taken as they are need no computation
        prepared_texts(list(positions), _preparation(node, Sources(compute, reads, positions)), torch.float32)
    return positions


def _computed(node: nn.Module, compute: Computation, own: Mapping[str, Tensor], reads: Reads) -> EffectiveParameters:
    """Compute effective parameters from single numbers: elementwise, because a shape may not be asked for."""
    with torch._C._EnableTorchFunction(), Hoisting({}, (), passes_shapes=False):
        parameters = compute(Scope(node, dict(own), (), reads))
    reads.refuse_side_effects()
    return parameters


def _values(parameters: EffectiveParameters) -> dict[str, Tensor]:
    return {name: value.values if isinstance(value, PerStep) else value for name, value in parameters.items()}


def _find(of_node: Any, of_class: Any, node: nn.Module) -> tuple[Any, tuple[Tensor, ...] | None]:
    """A trace of this neuron, or of another one of its class, that still holds, and the tensors that it reads."""
    known = of_node.get(node)
    if known is not None and (own := known.reads.find(node)) is not None:
        return known, own
    for known in of_class.get(type(node), ()):
        if (own := known.reads.find(node)) is not None:
            of_node[node] = known
            return known, own
    return None, None


def _remember(of_node: Any, of_class: Any, node: nn.Module, known: Any) -> None:
    """Remember a trace for this neuron and, among the latest ones, for its class."""
    with _adding:
        of_class[type(node)] = (*of_class.get(type(node), ())[1 - REMEMBERED :], known)
        of_node[node] = known


def _trace(
    node: nn.Module, states: Sequence[str], equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype,
    backward: bool, sources: Sources | None,
) -> NeuronStep:  # fmt: skip
    """Trace a step, and note what it reads: tensors of one element as numbers, the others through a prologue.

    If that fails, as for a tensor of one element that is indexed or viewed as a channel, all go through the prologue.
    """
    tensors = raw_tensors(node)
    numbers = {path: tensor for path, tensor in tensors.items() if tensor.numel() == 1}
    shaped = {path: tensor for path, tensor in tensors.items() if path not in numbers}
    arguments = node, states, equations, effective, dtype, backward, sources
    try:
        return _trace_with(numbers, shaped, *arguments)
    except StepTraceError:
        if not numbers:
            raise
        try:
            return _trace_with({}, tensors, *arguments)
        except StepTraceError:
            pass
        raise


def _trace_with(
    numbers: Mapping[str, Tensor], shaped: Mapping[str, Tensor], node: nn.Module, states: Sequence[str],
    equations: Equations, effective: tuple[Kind, ...], dtype: torch.dtype, backward: bool,
    sources: Sources | None,
) -> NeuronStep:  # fmt: skip
    reads = Reads()
    effective_names = {kind[0] for kind in effective}
    paths = {f"raw_{path}" if path in effective_names else path: path for path in numbers}
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
        present |= {**shaped, **held, "effective": Effective({name: values[name] for name in effective_names})}
        scope = Scope(node, present, tuple(states), reads)
        with torch._C._EnableTorchFunction(), hoisting or Hoisting(shaped, effective_names, values):
            spike = equations(scope, x)
        reads.refuse_side_effects()
        return spike, {name: _as_tensor(present[name], x) for name in states}

    prologue = None
    if shaped:
        hoisting = Hoisting(shaped, effective_names)
        with (
            PlainTorch(),
            torch.set_grad_enabled(gradients),
            contextlib.suppress(Exception),
            Guard("the input"),
        ):
            half = {name: torch.full((), 0.5, dtype=dtype) for name in ("x", *states, *effective_names, *paths)}
            step(half["x"], {name: half[name] for name in states}, half, hoisting, Reads())
        prologue = hoisting.prologue() if hoisting.taken() else None
        parameters += [
            Parameter(name, per_channel=tensor.numel() != 1, learned=tensor.requires_grad)
            for name, tensor in hoisting.taken().items()
        ]
    program = build_program(
        _title(node), step, states, parameters, dtype, backward, _preparation(node, sources) if sources else None
    )
    own = tuple(reads.tensors)
    taken = {name: own.index(paths[name]) for name in program.names if name in paths}
    return NeuronStep(program, reads, taken, prologue)


def _preparation(node: nn.Module, sources: Sources) -> Step:
    """A step that computes the effective parameters, as if they were states, from the neuron's own."""

    def prepare(x: Tensor, held: Any, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        paths = list(sources.reads.tensors)
        own = {paths[position]: values[own_name(name)] for name, (position, _) in sources.positions.items()}
        return x, _values(_computed(node, sources.compute, own, Reads()))

    return prepare


def _as_tensor(value: Any, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(x, value)


_UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)


def raw_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a neuron and of its submodules, such as a surrogate, by dotted name."""
    by_name = {}
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and type(tensor) not in _UNINITIALIZED:
                by_name[prefix + name] = tensor
    for name, child in module._modules.items():
        if child is not None:
            by_name.update(raw_tensors(child, f"{prefix}{name}."))
    return by_name


def _title(node: nn.Module) -> str:
    """The neuron on one line, without what does not affect its equations, such as an object's address."""
    surrogate = getattr(node, "surrogate_function", None)
    settings = ", ".join(
        part for part in node.extra_repr().split(", ") if not part.startswith(("step_mode", "backend"))
    )
    title = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(node).__name__}({settings}) with {surrogate}")
    return " ".join(title.split())
