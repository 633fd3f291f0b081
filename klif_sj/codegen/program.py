"""A neuron's step as a program: the C text of one time step, forward and backward, and what its arguments are.

A program is a value that encodes to a string. The operators take this string, so a compiled graph that outlives this
process, or a process that never saw the neuron, can still build the kernel.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .emit import COSTLY, c_identifier, exact_operations, function_body, worth_keeping
from .trace import Graph, PlainTorch, Step, StepTraceError, Value, origin, trace_backward, trace_forward

SEGMENT = 16
"""Time steps in a segment. A longer sequence runs segment by segment, and its states are stored in between."""


@dataclass(frozen=True)
class Parameter:
    """An effective parameter: one value, or one for each time step, for each channel, or for each pair of them."""

    name: str
    per_step: bool = False
    per_channel: bool = False
    learned: bool = False
    prepared: bool = False
    """Whether the kernel computes this parameter from another one, which is the neuron's own."""


@dataclass(frozen=True, eq=False)
class Program:
    """One time step in C. ``parameters`` lists the learned ones first, and the per-step ones last among those.

    ``prepare`` has a case for each prepared parameter, which computes it from the neuron's own; ``prepare_back`` has
    the gradients. ``backward`` recomputes what it needs of the step. If ``kept`` is not 0, ``forward_keeping`` is the
    step that also writes this number of costly results to an array, and ``backward_of_kept`` reads them there.
    """

    neuron: str
    states: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    dtype: str
    forward: str
    backward: str | None = None
    prepare: str = ""
    prepare_back: str = ""
    kept: int = 0
    forward_keeping: str | None = None
    backward_of_kept: str | None = None

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(p.name for p in self.parameters)

    @functools.cached_property
    def learned(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.learned)

    @functools.cached_property
    def costly(self) -> bool:
        """Whether a step computes an exponential or another operation that takes as long."""
        return any(f"{name}_(" in self.forward for name in COSTLY)

    @functools.cached_property
    def text(self) -> str:
        """The whole program as a string, which :meth:`decode` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def decode(text: str) -> Program:
        """The program that a text encodes. Equal texts give the same object, so programs are compared by identity."""
        fields = json.loads(text)
        fields["states"] = tuple(fields["states"])
        fields["parameters"] = tuple(Parameter(**p) for p in fields["parameters"])
        return Program(**fields)


def build_program(
    neuron: str, step: Step, states: Sequence[str], parameters: Sequence[Parameter], dtype: torch.dtype, backward: bool,
    effective: Step | None = None,
) -> Program:  # fmt: skip
    """Trace the step and print it. Parameters that the step does not read are left out.

    :param effective: computes the prepared parameters, as if they were states, from the neuron's own
    :raises StepTraceError: naming the operation that no kernel can express and the line it came from
    """
    try:
        with PlainTorch():
            program = _build_program(neuron, step, states, parameters, dtype, backward)
            if effective is not None:
                names = [p.name for p in parameters if p.prepared]
                program = replace(program, **_prepare_texts(program, names, effective, dtype))
            return Program.decode(program.text)
    except StepTraceError as error:
        raise StepTraceError(_explain(neuron, str(error))) from error.__cause__
    except Exception as error:
        raise StepTraceError(
            _explain(neuron, f"tracing it raised {type(error).__name__}: {str(error).rstrip('. ')}{origin(error)}")
        ) from error


def _build_program(
    neuron: str, step: Step, states: Sequence[str], parameters: Sequence[Parameter], dtype: torch.dtype, backward: bool
) -> Program:
    names = [p.name for p in parameters]
    _check_names(states, names)
    forward_graph = trace_forward(step, states, names, dtype)
    used_names = forward_graph.used_inputs()
    backward_graph = None
    if backward:
        learned = [p.name for p in parameters if p.learned]  # a surrogate's slope is used by the gradient alone
        backward_graph = trace_backward(step, states, names, learned, dtype)
        used_names |= backward_graph.used_inputs()
        used_names |= {name for name in learned if backward_graph.outputs[f"grad_{name}"] is not None}
    used = [p if backward else replace(p, learned=False) for p in parameters if p.name in used_names]
    used.sort(key=lambda p: (not p.learned, p.per_step))
    program = Program(
        neuron=neuron,
        states=tuple(states),
        parameters=tuple(used),
        dtype=str(dtype).removeprefix("torch."),
        forward=_forward_text(forward_graph, states, used),
    )
    return program if backward_graph is None else replace(program, **_backward_texts(backward_graph, states, used))


def prepared_texts(names: Sequence[str], effective: Step, dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """By a prepared parameter's name, in C, its computation from the neuron's own one, and the gradient of that.

    :raises StepTraceError: for a computation that no kernel can express, or that cuts the gradient off
    """
    own = [own_name(name) for name in names]
    forward = trace_forward(effective, names, own, dtype)
    backward = trace_backward(effective, names, own, own, dtype)

    def text(graph: Graph, name: str, result: str) -> str:
        if graph.outputs[result] is None:
            raise StepTraceError(f"{name!r} has no gradient")
        inputs = {own_name(name): "own", f"grad_{name}": "grad"}
        return function_body(graph.giving([result]), _all_inputs(graph, inputs), {result: "return {};"})

    return {name: (text(forward, name, name), text(backward, name, f"grad_{own_name(name)}")) for name in names}


def _prepare_texts(program: Program, names: Sequence[str], effective: Step, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a program that compute prepared parameters from the neuron's own, and their gradients.

    :param names: those of all prepared parameters, of which the step may read only some
    """
    bodies, texts = prepared_texts(names, effective, dtype), {"prepare": "", "prepare_back": ""}
    for j, parameter in enumerate(program.parameters):
        if parameter.prepared:
            for field, body in zip(texts, bodies[parameter.name], strict=True):
                texts[field] += f"    case {j}: {{\n{body}\n    }}\n"
    return texts


def own_name(name: str) -> str:
    """The name that the neuron's own parameter, from which a prepared one is computed, has in a trace."""
    return f"own_{name}"


def _check_names(states: Sequence[str], parameters: Sequence[str]) -> None:
    """Check that all that a step reads and returns has different names, by which a trace tells it apart."""
    counts = Counter(("x", "output", "grad_output", *states, *(f"grad_{name}" for name in states), *parameters))
    for name, count in counts.items():
        if count > 1:
            raise StepTraceError(f"{name!r} is the name of more than one of its input, states and parameters")


def _explain(neuron: str, reason: str) -> str:
    return (
        f"no kernel can be generated for one time step of {neuron}: {reason}. "
        "Write the step with elementwise torch operations, or use backend='torch'"
    )


def _inputs(states: Sequence[str], parameters: Sequence[Parameter]) -> dict[str, str]:
    return {
        "x": "x",
        **{name: f"state[{i}]" for i, name in enumerate(states)},
        **{p.name: f"p[{i}]" for i, p in enumerate(parameters)},
    }


def _forward_text(
    graph: Graph, states: Sequence[str], parameters: Sequence[Parameter], keep: Iterable[str] = ()
) -> str:
    outputs = {
        **{name: f"kept[{i}] = {{}};" for i, name in enumerate(keep)},
        **{name: f"state[{i}] = {{}};" for i, name in enumerate(states)},
        "output": "output = {};",
    }
    return function_body(graph, _all_inputs(graph, _inputs(states, parameters)), outputs)


def _backward_texts(graph: Graph, states: Sequence[str], parameters: Sequence[Parameter]) -> dict[str, Any]:
    """The fields of a program that compute its gradient."""
    inputs = {
        **_inputs(states, parameters),
        "grad_output": "grad_output",
        **{f"grad_{name}": f"grad_state[{i}]" for i, name in enumerate(states)},
    }
    outputs = {
        "grad_x": "grad_x = {};",
        **{f"grad_{name}": f"grad_state[{i}] = {{}};" for i, name in enumerate(states)},
        **{f"grad_{p.name}": f"sum_p[{i}] += {{}};  // grad_{p.name}" for i, p in enumerate(parameters) if p.learned},
    }
    gradient, step = graph.giving(outputs), ("output", *states)
    exact = exact_operations(graph, step)
    texts: dict[str, Any] = {"backward": function_body(gradient, _all_inputs(gradient, inputs), outputs, exact)}
    results = {i: f"kept_{graph.operations[i].name}_{n}" for n, i in enumerate(worth_keeping(graph, step), 1)}
    if results:
        with_kept = {**graph.giving(step).outputs, **{name: Value(index) for index, name in results.items()}}
        inputs |= {name: f"kept[{n}]" for n, name in enumerate(results.values())}
        gradient_of_kept = gradient.taking(results)
        texts |= {
            "kept": len(results),
            "forward_keeping": _forward_text(replace(graph, outputs=with_kept), states, parameters, results.values()),
            "backward_of_kept": function_body(gradient_of_kept, _all_inputs(gradient_of_kept, inputs), outputs, exact),
        }
    return texts


def _all_inputs(graph: Graph, expressions: dict[str, str]) -> dict[str, str]:
    """An expression for every input of the graph; the unused ones are never printed."""
    return {name: expressions.get(name, c_identifier(name)) for name in graph.inputs}
