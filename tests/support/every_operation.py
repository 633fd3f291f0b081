"""Every operation and every literal that the generator can print, in one step: what a compiler must know."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import torch

from klif_sj.codegen.emit import C_TYPES, CALLS, COMPARISONS, FILLS, FUNCTIONS, IDENTITIES, INFIX, function_body
from klif_sj.codegen.program import Program
from klif_sj.codegen.trace import Graph, Operation, Value

FLOATS = (
    0.0, -0.0, 1.0, -1.5, 0.1, 1e-45, -1e-45, 1e-39, 5e-324, 3.4e38, 1e300, -1e300, 7, -3, 2**53 + 1, math.inf,
    -math.inf, math.nan,
)  # fmt: skip
NUMBERS = {
    torch.bool: (False, True), torch.uint8: (0, 255), torch.int32: (-7, 2**31 - 1), torch.int64: (-(2**40), 2**63 - 1),
}  # fmt: skip
BINARY = {"clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "atan2", "fmod", "hypot"}
POWERS = (0, 1, 2, 3, 0.5, -0.5, -1, -2, 2.5)


def every_operation(dtype: torch.dtype) -> Program:
    """A step that sums every operation of the generator, with arguments of every kind, and every kind of number."""
    x, state, third, condition, made = Value(-1), Value(-2), Value(0), Value(1), []
    given = (x, state, third)
    logical = ("bitwise", "logical")

    def add(name: str, *args: object, out: torch.dtype = dtype, **options: object) -> Value:
        made.append(Operation(name, args, options, out, None))
        return Value(len(made) - 1)

    add("mul", x, state)
    add("gt", x, state, out=torch.bool)
    terms = []
    for name in INFIX:
        if name.startswith(logical):
            terms.append(add(name, condition, add("ge", x, 0.5, out=torch.bool), out=torch.bool))
        else:
            terms.append(add(name, x, state, out=torch.bool if name in COMPARISONS else dtype))
    for name, function in FUNCTIONS.items():
        parameters = inspect.signature(function).parameters.values()
        bools = {"condition": condition, "mask": condition}
        args = [bools.get(p.name, value) for p, value in zip(parameters, itertools.cycle(given))]
        if name in ("logical_not", "bitwise_not"):
            terms.append(add(name, condition, out=torch.bool))
        elif "is_result" in inspect.signature(function).parameters:
            at = [p.name for p in parameters].index("is_result")
            terms += [add(name, *args[:at], flag, *args[at + 1 :]) for flag in (False, True)]
        else:
            # Once with all, and once with as few as there must be.
            fewest = sum(p.default is p.empty for p in parameters)
            keywords: dict[str, Any] = {"value": 0.25} if name.startswith("addc") else {}
            terms.append(add(name, *(args[:3] if keywords else args), **keywords))
            terms.append(add(name, *args[: fewest + (name == "clamp")]))
    terms += [add(name, x, *[state] * (name in BINARY)) for name in sorted(CALLS)]
    terms += [add("pow", x, exponent) for exponent in (*POWERS, state)]
    terms += [add(name, x, state, alpha=0.3) for name in ("add", "sub", "rsub")]
    terms += [add(name, x, state) for name in sorted(IDENTITIES)]
    terms += [add("_to_copy", add("_to_copy", x, out=kind)) for kind in C_TYPES]
    terms += [add(name, *[x] * at, 0.75) for name, at in FILLS.items()]
    numbers = [(kind, number) for kind, values in {**NUMBERS, dtype: FLOATS}.items() for number in values]
    # Compared with: a sum with NaN in it would be NaN, and nothing of the rest be compiled.
    terms += [add("gt", x, add("full", (), number, out=kind), out=torch.bool) for kind, number in numbers]
    total = x
    for term in terms:
        total = add("add", total, term)
    graph = Graph(("x", "v"), tuple(made), {"v": total, "output": total}, dtype)
    text = function_body(graph, {"x": "x", "v": "state[0]"}, {"v": "state[0] = {};", "output": "output = {};"})
    return Program("every operation", ("v",), (), str(dtype).removeprefix("torch."), text)
