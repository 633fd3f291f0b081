"""Trace one time step of a neuron, and its vector-Jacobian product, into a list of scalar operations.

The step runs once on 0-dimensional tensors, under a dispatch mode that sees every ATen call, forward and backward. The
result has inputs, operations in order and outputs; it knows nothing of the neuron but their names.

A storage stands for a value: every tensor is 0-dimensional, so a view of a tensor is the whole tensor. An operation
whose result shares a known storage is therefore an alias, and one that writes to a known storage gives it a new value.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import os
import sys
import textwrap
import threading
import tokenize
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Step = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]

_MOVES = {"as_strided", "permute", "squeeze", "t", "transpose", "unfold"}
"""Operations that move elements or drop dimensions, and leave a single number as it is."""

_INTERNAL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)


class StepTraceError(RuntimeError):
    """A neuron's step uses something that no scalar kernel can express.

    It is no TypeError, because torch's operators answer one by trying the other operand's method, and lose its message.
    """


@dataclass(frozen=True)
class Line:
    """The statement of Python that an operation came from, by the number of its first line."""

    function: str
    file: str
    number: int
    last: int

    @property
    def text(self) -> str:
        """The statement on one line."""
        lines = (linecache.getline(self.file, number).strip() for number in range(self.number, self.last + 1))
        return " ".join(lines).replace("( ", "(").replace(" )", ")")

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.number} in {self.function}: {self.text}"

    @staticmethod
    def of(code: CodeType, number: int) -> Line:
        first, last = _statements(code).get(number, (number, number))
        return Line(code.co_name, code.co_filename, first, last)


@functools.cache
def _statements(code: CodeType) -> dict[int, tuple[int, int]]:
    """For every line of a function, the first and last line of the statement that it belongs to."""
    spans: dict[int, tuple[int, int]] = {}
    try:
        # inspect.getsourcelines would look through every loaded module for the file, which is known here.
        start = code.co_firstlineno
        lines = inspect.getblock(linecache.getlines(code.co_filename)[start - 1 :])
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (SyntaxError, tokenize.TokenError):
        return spans
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and getattr(node, "body", None) is None:
            span = (node.lineno + start - 1, (node.end_lineno or node.lineno) + start - 1)
            spans.update((number, span) for number in range(span[0], span[1] + 1))
    return spans


@dataclass(frozen=True)
class Value:
    """The result of operation ``index``, or an input where ``index`` is negative."""

    index: int


@dataclass(frozen=True)
class Operation:
    """``name(*args, **options)``, an ATen operation without its namespace; args are values or Python scalars."""

    name: str
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    dtype: torch.dtype
    line: Line | None

    def reads(self) -> list[int]:
        """The indices of the values that it reads."""
        return [arg.index for arg in self.args if isinstance(arg, Value)]


@dataclass(frozen=True)
class Graph:
    """Operations in order, with ``inputs`` and ``outputs`` by name. An output that is None stands for zero."""

    inputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    outputs: Mapping[str, Value | None]
    dtype: torch.dtype

    def results(self) -> list[int]:
        """The indices of the values that are outputs."""
        return [value.index for value in self.outputs.values() if value is not None]

    def live(self) -> set[int]:
        """The indices of the values that an output depends on."""
        live = set(self.results())
        for index in range(len(self.operations) - 1, -1, -1):
            if index in live:
                live.update(self.operations[index].reads())
        return live

    def used_inputs(self) -> set[str]:
        """The names of the inputs that an output depends on."""
        live = self.live()
        return {name for i, name in enumerate(self.inputs) if -1 - i in live}

    def giving(self, names: Iterable[str]) -> Graph:
        """The same operations with only those outputs that have these names."""
        return replace(self, outputs={name: self.outputs[name] for name in names})

    def taking(self, results: Mapping[int, str]) -> Graph:
        """The same graph, except that these operations' results, by index, come from new inputs of these names."""
        replacements = {index: Value(-1 - len(self.inputs) - n) for n, index in enumerate(results)}

        def read(value: Any) -> Any:
            return replacements.get(value.index, value) if isinstance(value, Value) else value

        operations = tuple(replace(op, args=tuple(map(read, op.args))) for op in self.operations)
        outputs = {name: read(value) for name, value in self.outputs.items()}
        return replace(self, inputs=(*self.inputs, *results.values()), operations=operations, outputs=outputs)


class _Recorder(TorchDispatchMode):
    """Records ATen calls on 0-dimensional tensors."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._kept_alive: list[Tensor] = []
        self._values: dict[int, Value] = {}
        for i, tensor in enumerate(inputs.values()):
            self._store(tensor, Value(-1 - i))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False keeps torch from wrapping the mode, which would import dynamo: a second or more in a first call."""
        return False

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor holds now."""
        value = self._values.get(_storage(tensor))
        if value is None:
            raise StepTraceError(
                f"it reads a tensor that is neither input, state nor parameter (shape {tuple(tensor.shape)})"
                f"{at(caller())}. Register it on the neuron as a parameter or buffer with one element, or return it "
                "from effective_parameters()"
            )
        return value

    def refuse_changes(self, inputs: Mapping[str, Tensor], parameters: Sequence[str]) -> None:
        """:raises StepTraceError: if a step has written to a parameter, because a kernel would lose the new value"""
        for index, name in enumerate(inputs):
            now = self.value(inputs[name])
            if name in parameters and now != Value(-1 - index):
                line = self.operations[now.index].line
                raise StepTraceError(
                    f"it changes {name!r} in place{at(line)}; a step may change states alone: register {name!r} with "
                    "register_memory"
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # in TorchScript's interpreter a step's function mode is still active
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        line = caller()
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            raise StepTraceError(
                f"it reads a tensor's value in Python (.item(), if, float()){at(line)}. Choose between values with "
                "torch.where instead"
            )
        if func.namespace != "aten":
            raise StepTraceError(f"it calls the registered operator {name}, whose arithmetic cannot be seen{at(line)}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise StepTraceError(f"aten::{name} draws random numbers{at(line)}")
        if name in _MOVES:
            raise StepTraceError(f"aten::{name} moves elements, and a kernel computes each of them alone{at(line)}")
        writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        reads_values = not name.startswith("new_") and not name.endswith("_like")
        operands = tuple(self._operand(arg) if reads_values or not isinstance(arg, Tensor) else None for arg in args)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.ndim:
            shape = f" of shape {tuple(out.shape)}" if isinstance(out, Tensor) else ""
            raise StepTraceError(f"aten::{name} gives no scalar but a {type(out).__name__}{shape}{at(line)}")
        if any(writes) and not writes[0]:
            raise StepTraceError(f"aten::{name} writes to an argument that is not its first{at(line)}")
        if not any(writes) and _storage(out) in self._values:
            return out
        self.operations.append(Operation(name.removesuffix("_"), operands, kwargs, out.dtype, line))
        self._store(out, Value(len(self.operations) - 1))
        return out

    def _operand(self, arg: Any) -> Any:
        return self.value(arg) if isinstance(arg, Tensor) else arg

    def _store(self, tensor: Tensor, value: Value) -> None:
        self._kept_alive.append(tensor)
        self._values[_storage(tensor)] = value


def trace_forward(step: Step, states: Sequence[str], parameters: Sequence[str], dtype: torch.dtype) -> Graph:
    """Trace a step. Inputs are x, the states and the parameters; outputs are ``output`` (the spike) and new states."""
    inputs = _scalars(("x", *states, *parameters), dtype)
    with torch.no_grad(), _Recorder(inputs) as recorder:
        spike, updated = _run_step(step, inputs, states, parameters)
        recorder.refuse_changes(inputs, parameters)
    outputs = {"output": recorder.value(spike), **{name: recorder.value(updated[name]) for name in states}}
    return Graph(tuple(inputs), tuple(recorder.operations), outputs, dtype)


def trace_backward(
    step: Step, states: Sequence[str], parameters: Sequence[str], learned: Sequence[str], dtype: torch.dtype
) -> Graph:
    """Trace a step together with its vector-Jacobian product.

    Inputs are those of the step, ``grad_output`` and ``grad_STATE`` of the new states; outputs are those of the step,
    ``grad_x``, ``grad_STATE`` of the old states, and ``grad_PARAMETER`` of the ``learned`` ones.
    """
    outputs: dict[str, Value | None]
    leaves = _scalars(("x", *states, *parameters), dtype)
    upstream = _scalars(("grad_output", *(f"grad_{name}" for name in states)), dtype)
    wanted = ("x", *states, *learned)
    for name in wanted:
        leaves[name].requires_grad_()
    with torch.enable_grad():
        # The step gets copies, because it may write to its inputs (self.v += x), which autograd refuses for leaves.
        inputs = {name: leaf.clone() for name, leaf in leaves.items()}
    with torch.enable_grad(), _Recorder({**inputs, **upstream}) as recorder:
        spike, updated = _run_step(step, inputs, states, parameters)
        results = [spike, *(updated[name] for name in states)]
        outputs = dict(zip(("output", *states), map(recorder.value, results), strict=True))
        # The gradient is that of one scalar. If autograd were given gradients as tensors, it would import its symbolic
        # shapes, which takes a second.
        weighted = [r * g for r, g in zip(results, upstream.values(), strict=True) if r.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if weighted:
            root = functools.reduce(torch.add, weighted)
            grads = torch.autograd.grad(root, [leaves[name] for name in wanted], allow_unused=True)
    outputs |= {
        f"grad_{name}": None if grad is None else recorder.value(grad) for name, grad in zip(wanted, grads, strict=True)
    }
    for name in learned:
        value = outputs[f"grad_{name}"]
        while value is not None and value.index >= 0 and recorder.operations[value.index].name == "sum":
            # A user's autograd function sums the gradient of a parameter; the kernel sums it over all neurons anyway.
            value = recorder.operations[value.index].args[0]
        outputs[f"grad_{name}"] = value
    return Graph((*inputs, *upstream), tuple(recorder.operations), outputs, dtype)


class OutsideJitTrace:
    """Keeps what runs within it out of a torch.jit trace under way, in which reading a size is an operation too."""

    def __enter__(self) -> None:
        self._trace = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]

    def __exit__(self, *error: Any) -> None:
        torch._C._set_tracing_state(self._trace)  # type: ignore[attr-defined]


_tracing = threading.local()


def is_tracing() -> bool:
    """Whether this thread is tracing a step. The step's tensors are stand-ins then."""
    return getattr(_tracing, "under_way", False)


class PlainTorch:
    """Shields a trace from what surrounds the call: autocast, inference mode, a default device, export, other modes."""

    def __enter__(self) -> None:
        self._outer, _tracing.under_way = is_tracing(), True
        self._contexts = (
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),  # a default device is a function mode, and export notes calls by one
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            # Otherwise activation checkpointing would run its region again when the trace takes a gradient.
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        )
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)
        _tracing.under_way = self._outer


def _run_step(
    step: Step, inputs: Mapping[str, Tensor], states: Sequence[str], parameters: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    return step(inputs["x"], {name: inputs[name] for name in states}, {name: inputs[name] for name in parameters})


def _scalars(names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.full((), 0.5, dtype=dtype) for name in names}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def caller() -> Line | None:
    """The innermost line of Python outside torch and this tracer, which is the neuron's or the surrogate's own.

    None for an operation that autograd derived by itself.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == __file__ and frame.f_code.co_name == trace_backward.__name__:
            return None
        if not file.startswith((*_INTERNAL, "<frozen")):
            return Line.of(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return None


def origin(error: Exception) -> str:
    """Where the neuron's own code raised an error, as the end of a sentence; empty where it did not."""
    line = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith((*_INTERNAL, "<frozen")):
            line = Line.of(frame.f_code, number)
    return at(line)


def at(line: Line | None) -> str:
    return f", at {line}" if line else ""
