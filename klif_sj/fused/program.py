"""A neuron's step as a program: the C text of one time step, forward and backward, and what its arguments are.

A program is a value. It encodes to a string that holds all of it, which is what the operators take: a compiled graph
that outlives this process, or a process that never saw the neuron, can still build the kernel.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from .source import c_identifier, function_body
from .trace import Graph, Step, StepTraceError, origin, trace_backward, trace_forward


@dataclass(frozen=True)
class Parameter:
    """An effective parameter: one value, or one per time step, per channel, or per both."""

    name: str
    per_step: bool = False
    per_channel: bool = False
    learned: bool = False


@dataclass(frozen=True)
class Program:
    """One time step in C. ``parameters`` lists the learned ones first, the per-step ones of those last."""

    neuron: str
    states: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    dtype: str
    forward: str
    backward: str | None

    @property
    def learned(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.learned)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def decode(text: str) -> Program:
        fields = json.loads(text)
        fields["states"] = tuple(fields["states"])
        fields["parameters"] = tuple(Parameter(**p) for p in fields["parameters"])
        return Program(**fields)


def build_program(
    neuron: str, step: Step, states: Sequence[str], parameters: Sequence[Parameter], dtype: torch.dtype, backward: bool
) -> Program:
    """Trace the step and print it. Parameters that the step does not read are left out.

    :raises StepTraceError: naming the operation that no kernel can express and the line it came from
    """
    names = [p.name for p in parameters]
    try:
        _check_names(states, names)
        forward_graph = trace_forward(step, states, names, dtype)
        used = forward_graph.used_inputs()
        backward_graph = None
        if backward:
            learned = [p.name for p in parameters if p.learned and p.name in used]
            backward_graph = trace_backward(step, states, names, learned, dtype)
            used |= backward_graph.used_inputs()
        kept = [p if backward else replace(p, learned=False) for p in parameters if p.name in used]
        kept.sort(key=lambda p: (not p.learned, p.per_step))
        return Program(
            neuron=neuron,
            states=tuple(states),
            parameters=tuple(kept),
            dtype=str(dtype).removeprefix("torch."),
            forward=_forward_text(forward_graph, states, kept),
            backward=None if backward_graph is None else _backward_text(backward_graph, states, kept),
        )
    except StepTraceError as error:
        raise StepTraceError(_explain(neuron, str(error))) from error.__cause__
    except Exception as error:
        raise StepTraceError(
            _explain(neuron, f"tracing it raised {type(error).__name__}: {str(error).rstrip('. ')}{origin(error)}")
        ) from error


def _check_names(states: Sequence[str], parameters: Sequence[str]) -> None:
    """Everything that a step reads or gives is known by its name alone."""
    used = Counter(("x", "output", "grad_output", *states, *(f"grad_{name}" for name in states), *parameters))
    for name, count in used.items():
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


def _forward_text(graph: Graph, states: Sequence[str], parameters: Sequence[Parameter]) -> str:
    outputs = {**{name: f"state[{i}] = {{}};" for i, name in enumerate(states)}, "output": "output = {};"}
    return function_body(graph, _all_inputs(graph, _inputs(states, parameters)), outputs)


def _backward_text(graph: Graph, states: Sequence[str], parameters: Sequence[Parameter]) -> str:
    inputs = {
        **_inputs(states, parameters),
        "grad_output": "grad_output",
        **{f"grad_{name}": f"grad_state[{i}]" for i, name in enumerate(states)},
    }
    outputs = {
        "grad_x": "grad_x = {};",
        **{f"grad_{name}": f"grad_state[{i}] = {{}};" for i, name in enumerate(states)},
        **{f"grad_{p.name}": f"grad_p[{i}] = {{}};" for i, p in enumerate(parameters) if p.learned},
    }
    return function_body(graph, _all_inputs(graph, inputs), outputs)


def _all_inputs(graph: Graph, expressions: dict[str, str]) -> dict[str, str]:
    """An expression for every input of the graph; the unused ones are never printed."""
    return {name: expressions.get(name, c_identifier(name)) for name in graph.inputs}
