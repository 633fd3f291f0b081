"""Print a traced step as C: two functions, ``step`` and ``step_backward``, in the neuron's own names.

The same text is compiled for the GPU and for the host. Every operation of the step is printed as torch computes it, in
the same order and precision. The results are torch's own, because the compilers contract nothing to fused
multiply-adds. Only in the gradient, a product that is added to something is printed as ``fma_``, which the GPU rounds
once.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from .trace import Graph, Line, Operation, StepTraceError, Value

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "bool",
    torch.int64: "int64",
    torch.int32: "int",
    torch.uint8: "uint8",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ASSIGNMENT = re.compile(r"(?:self\.)?([A-Za-z_]\w*)\s*[-+*/]?=(?!=)")


def _power(base: str, exponent: Any, function: str) -> str:
    """``pow`` as torch computes it: small whole exponents give products, and halves give square roots."""
    simple = {
        0: "real(1)", 1: base, 2: f"({base} * {base})", 3: f"({base} * {base} * {base})", 0.5: f"sqrt_({base})",
        -0.5: f"(real(1) / sqrt_({base}))", -1: f"(real(1) / {base})", -2: f"(real(1) / ({base} * {base}))",
    }  # fmt: skip
    return simple.get(exponent, function)


INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "true_divide": "/", "ge": ">=", "gt": ">", "le": "<=", "lt": "<",
    "eq": "==", "ne": "!=", "bitwise_and": "&&", "logical_and": "&&", "bitwise_or": "||", "logical_or": "||",
    "bitwise_xor": "!=", "logical_xor": "!=",
}  # fmt: skip
COMPARISONS = frozenset(("ge", "gt", "le", "lt", "eq", "ne"))

FUNCTIONS: Mapping[str, Callable[..., str]] = {
    "rsub": lambda a, b: f"({b} - {a})",
    "neg": lambda a: f"(-{a})",
    "reciprocal": lambda a: f"(real(1) / {a})",
    "square": lambda a: f"({a} * {a})",
    "relu": lambda a: f"({a} < real(0) ? real(0) : {a})",
    "threshold_backward": lambda g, a, low: f"({a} <= {low} ? real(0) : {g})",
    "leaky_relu": lambda a, slope="real(0.01)": f"({a} > real(0) ? {a} : {a} * {slope})",
    "leaky_relu_backward": lambda g, a, slope, is_result: f"({a} > real(0) ? {g} : {g} * {slope})",
    "elu": lambda a, alpha="real(1)", scale="real(1)", inner="real(1)": (
        f"({a} > real(0) ? {a} * {scale} : expm1_({a} * {inner}) * ({alpha} * {scale}))"
    ),
    "celu": lambda a, alpha="real(1)": f"({a} > real(0) ? {a} : expm1_({a} / {alpha}) * {alpha})",
    "elu_backward": lambda g, alpha, scale, inner, is_result, a: (
        f"({a} > real(0) ? {g} * {scale} : {g} * {inner} * ({a} + {alpha} * {scale}))" if is_result == "true"
        else f"({a} > real(0) ? {g} * {scale} : {g} * {inner} * {alpha} * {scale} * exp_({a} * {inner}))"
    ),
    "sigmoid_backward": lambda g, y: f"sigmoid_backward_({g}, {y})",
    "tanh_backward": lambda g, y: f"({g} * fma_(-{y}, {y}, real(1)))",
    "hardtanh": lambda a, low="real(-1)", high="real(1)": f"clamp_({a}, {low}, {high})",
    "hardtanh_backward": lambda g, a, low, high: f"({a} <= {low} || {a} >= {high} ? real(0) : {g})",
    "clamp": lambda a, low=None, high=None: (
        f"clamp_max_({a}, {high})" if low is None else f"clamp_min_({a}, {low})" if high is None
        else f"clamp_({a}, {low}, {high})"
    ),
    "where": lambda condition, a, b: f"({condition} ? {a} : {b})",
    "masked_fill": lambda a, mask, value: f"({mask} ? {value} : {a})",
    "logical_not": lambda a: f"(!{a})",
    "bitwise_not": lambda a: f"(!{a})",
    "addcmul": lambda a, b, c, value="real(1)": f"({a} + {value} * {b} * {c})",
    "addcdiv": lambda a, b, c, value="real(1)": f"({a} + {value} * {b} / {c})",
    "lerp": lambda a, b, w: f"({w} < real(0.5) ? {a} + {w} * ({b} - {a}) : {b} - ({b} - {a}) * (real(1) - {w}))",
    "softplus": lambda a, beta="real(1)", limit="real(20)": (
        f"({a} * {beta} > {limit} ? {a} : log1p_(exp_({a} * {beta})) / {beta})"
    ),
    "softplus_backward": lambda g, a, beta, limit: (
        f"({a} * {beta} > {limit} ? {g} : {g} * exp_({a} * {beta}) / (exp_({a} * {beta}) + real(1)))"
    ),
    "silu": lambda a: f"({a} / (real(1) + exp_(-{a})))",
    "silu_backward": lambda g, a: f"({g} * sigmoid_({a}) * (real(1) + {a} * (real(1) - sigmoid_({a}))))",
}  # fmt: skip
"""Operations that are printed as an expression of their arguments."""

READ_ONCE = frozenset(("rsub", "neg", "reciprocal", "where", "masked_fill", "logical_not", "_to_copy"))
"""Further operations that print every argument once, so that an argument may itself be an expression."""

CALLS = _words("""
    abs exp exp2 expm1 log log1p log2 log10 sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh erf erfc sigmoid sign
    sgn floor ceil round trunc clamp_min clamp_max maximum minimum fmax fmin atan2 fmod hypot
""")
"""Operations that the prelude defines as functions, under the same name with a trailing underscore."""

COSTLY = _words("""
    exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh erf erfc sigmoid atan2 pow elu celu
    softplus silu
""")
"""Operations that take longer than writing their result to a cache and reading it again."""

_RESERVED = frozenset(f"{name}_" for name in (*CALLS, "pow", "reciprocal", "fma", "sigmoid_backward")) | _words("""
    x p state output kept sum_p grad_state grad_output grad_x real io step int64 uint8 bits32
    NAN INFINITY INLINE DEVICE LAMBDA
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl concept const const_cast
    consteval constexpr constinit continue decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or
    or_eq private protected public register reinterpret_cast requires return short signed sizeof static static_assert
    static_cast struct switch template this thread_local throw true try typedef typeid typename union unsigned using
    virtual void volatile while xor xor_eq
""")
"""Names that have a meaning in C++, or in the functions around the printed statements."""

CONSTANTS = {
    "zeros_like": 0.0, "new_zeros": 0.0, "zeros": 0.0, "zero": 0.0, "ones_like": 1.0, "new_ones": 1.0, "ones": 1.0,
    "empty_like": 0.0,  # its values are overwritten later
}  # fmt: skip
FILLS = {"full_like": 1, "full": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1}
IDENTITIES = frozenset(("_to_copy", "clone", "lift_fresh", "lift_fresh_copy", "expand", "contiguous"))


def literal(value: float | bool, dtype: torch.dtype) -> str:
    """A Python number as a C literal of the dtype, rounded as torch rounds it."""
    if dtype == torch.bool:
        return "true" if value else "false"
    if dtype not in (torch.float32, torch.float64):
        return str(int(value))
    with np.errstate(over="ignore"):
        rounded = (np.float32 if dtype == torch.float32 else np.float64)(value)
    if math.isnan(value):
        return "real(NAN)"
    if np.isinf(rounded):
        return "real(INFINITY)" if value > 0 else "real(-INFINITY)"
    text = str(rounded)
    text = text if re.search(r"[.e]", text) else f"{text}.0"
    text += "f" if dtype == torch.float32 else ""
    return f"({text})" if value < 0 or text.startswith("-") else text


def worth_keeping(graph: Graph, step: Collection[str]) -> list[int]:
    """The indices of the costly operations that both the outputs named ``step`` and the other outputs need.

    A kernel that repeats the step before it computes the other outputs can keep these results for them. The array in
    which it keeps them has the arithmetic's dtype, so only results of that dtype are listed.
    """
    in_step, needed, costly = graph.giving(step).live(), set(graph.giving(graph.outputs.keys() - step).results()), []
    for index in range(len(graph.operations) - 1, -1, -1):
        if index not in needed:
            continue
        operation = graph.operations[index]
        if index in in_step and operation.name in COSTLY and operation.dtype == graph.dtype:
            costly.append(index)
        else:
            needed.update(operation.reads())
    return costly[::-1]


def exact_operations(graph: Graph, step: Collection[str]) -> set[int]:
    """The indices of the operations that must give torch's own bits.

    These are all operations that the outputs named ``step`` need, and all that a comparison needs, because the last
    bit of a number can change the result of a comparison.
    """
    exact = graph.giving(step).live()
    for index in range(len(graph.operations) - 1, -1, -1):
        operation = graph.operations[index]
        if index in exact or not operation.dtype.is_floating_point:
            exact.update(operation.reads())
    return exact


def function_body(
    graph: Graph, inputs: Mapping[str, str], outputs: Mapping[str, str], exact: Collection[int] | None = None
) -> str:
    """Statements that compute the graph: ``inputs`` maps names to C expressions, ``outputs`` to C assignments.

    :param exact: the indices of operations that are printed as they are; by default all. Any other sum becomes
        ``fma_`` if it adds a product that no other operation reads.
    :raises StepTraceError: for an operation without a C form, naming it and its line
    """
    return _Printer(graph, inputs, outputs, exact).text()


class _Printer:
    def __init__(
        self, graph: Graph, inputs: Mapping[str, str], outputs: Mapping[str, str], exact: Collection[int] | None
    ) -> None:
        self.graph, self.inputs, self.outputs, self.dtype = graph, inputs, outputs, graph.dtype
        self.exact = range(len(graph.operations)) if exact is None else exact
        self.uses = self._count_uses()
        self.within: set[int] = set()
        self.terms = {
            name: self._terms(value)
            for name, target in outputs.items()
            if " += " in target and (value := graph.outputs[name]) is not None
        }
        self.products = self._find_products()
        self.lines: list[str] = []
        self.names: Counter[str] = Counter(_RESERVED)
        self.expressions: dict[int, str] = {}

    def text(self) -> str:
        used = self.graph.used_inputs()
        for i, name in enumerate(self.graph.inputs):
            identifier = c_identifier(name)
            if identifier in _RESERVED and self.inputs[name] != identifier:
                identifier += "_"
            self.expressions[-1 - i] = identifier
            if name in used and self.inputs[name] != identifier:
                self.lines.append(f"const real {identifier} = {self.inputs[name]};")
            self.names[identifier] += 1
        shown: Line | None = None
        for index, operation in enumerate(self.graph.operations):
            if not self.uses[index]:
                continue
            if operation.line is not None and operation.line != shown:
                shown = operation.line
                self.lines.append(f"// {shown.text}".rstrip("\\"))  # a backslash would continue the comment
            self._print(index, operation)
        for name, target in self.outputs.items():
            value = self.graph.outputs[name]
            summed, _, comment = target.partition(" += {};")
            for term in self.terms.get(name, ()):
                is_product = term.index in self.within
                result = self._fma(term, summed) if is_product else self._operand(term, self.dtype)
                self.lines.append(f"{summed} = {result};{comment}" if is_product else target.format(result))
            if name not in self.terms:
                self.lines.append(target.format("real(0)" if value is None else self._operand(value, self.dtype)))
        return "\n".join(f"    {line}" for line in self.lines)

    def _find_products(self) -> dict[int, int]:
        """For each sum that is rounded once with a product: its index, and the product's place among its terms."""
        products = {}
        for index, operation in enumerate(self.graph.operations):
            plain = operation.name in ("add", "sub", "rsub") and operation.options.get("alpha", 1) == 1
            if not self.uses[index] or not self._may_change(index) or not plain:
                continue
            place = next((place for place in (1, 0) if self._is_product(operation.args[place])), None)
            if place is not None:
                products[index] = place
        return products

    def _terms(self, value: Value) -> list[Value]:
        """The terms that are added to an output one by one. A sum that is read only here is split into its terms."""
        if self._is_lone(value):
            operation = self.graph.operations[value.index]
            arguments = operation.reads()
            if operation.name == "add" and operation.options.get("alpha", 1) == 1 and len(arguments) == 2:
                self.within.add(value.index)
                return [term for index in arguments for term in self._terms(Value(index))]
        self._is_product(value)
        return [value]

    def _may_change(self, index: int) -> bool:
        """Whether a result may be rounded differently from torch's."""
        return index not in self.exact and index not in self.within and self.graph.operations[index].dtype == self.dtype

    def _is_lone(self, term: Any) -> bool:
        """Whether a term is read only once, and may be rounded differently from torch's."""
        if not isinstance(term, Value) or term.index < 0:
            return False
        return self.uses[term.index] == 1 and self._may_change(term.index)

    def _is_product(self, term: Any) -> bool:
        """Whether a term is a product, or a negated one, that is read only once. It then gets no line of its own."""
        if not self._is_lone(term):
            return False
        operation = self.graph.operations[term.index]
        is_product = operation.name == "mul" and not any(map(self._is_one, operation.args))
        if is_product or (operation.name == "neg" and self._is_product(operation.args[0])):
            self.within.add(term.index)
            return True
        return False

    def _is_one(self, arg: Any) -> bool:
        operation = self.graph.operations[arg.index] if isinstance(arg, Value) and arg.index >= 0 else None
        return arg == 1 if operation is None else CONSTANTS.get(operation.name) == 1

    def _fma(self, product: Value, addend: str, negative: bool = False) -> str:
        """The product, negated where ``negative`` says so, plus ``addend``; the sum is rounded once."""
        operation = self.graph.operations[product.index]
        if operation.name == "neg":
            return self._fma(operation.args[0], addend, not negative)
        first, second = (self._operand(arg, self.dtype) for arg in operation.args)
        return f"fma_({'-' * negative}{first}, {second}, {addend})"

    def _sum(self, index: int, operation: Operation) -> str:
        """A sum that is rounded once with one of its terms, a product."""
        place = self.products[index]
        minus = {"add": None, "sub": 1, "rsub": 0}[operation.name]
        addend = self._operand(operation.args[1 - place], self.dtype)
        return self._fma(operation.args[place], f"-{addend}" if minus == 1 - place else addend, minus == place)

    def _count_uses(self) -> Counter[int]:
        """How often each value is read by the outputs and by the operations that they need."""
        uses: Counter[int] = Counter(v.index for v in self.graph.outputs.values() if v is not None)
        for index in range(len(self.graph.operations) - 1, -1, -1):
            if uses[index]:
                uses.update(a.index for a in self.graph.operations[index].args if isinstance(a, Value))
        return uses

    def _print(self, index: int, operation: Operation) -> None:
        expression = self._sum(index, operation) if index in self.products else self._expression(operation)
        if index in self.within:
            self.expressions[index] = expression
            return
        is_output = any(v == Value(index) for v in self.graph.outputs.values())
        trivial = re.fullmatch(r"\w+|[\d.e+-]+f?", expression)
        if trivial or (self.uses[index] == 1 and not is_output and self._stays_in_line(index, operation)):
            self.expressions[index] = expression
            return
        name = self._name(index, operation)
        bare = expression[1:-1] if _is_wrapped(expression) else expression
        self.lines.append(f"const {self._c_type(operation)} {name} = {bare};")
        self.expressions[index] = name

    def _stays_in_line(self, index: int, operation: Operation) -> bool:
        """Whether a result is printed within its only reader, because both come from the same line of Python."""
        reader = next((op for op in self.graph.operations[index + 1 :] if Value(index) in op.args), None)
        if reader is None or reader.line != operation.line:
            return False
        reads_once = reader.name in INFIX or reader.name in CALLS or reader.name in READ_ONCE
        return reads_once and (operation.line is not None or len(self._expression(operation)) < 40)

    def _name(self, index: int, operation: Operation) -> str:
        outputs = [name for name, value in self.graph.outputs.items() if value == Value(index)]
        last = all(op.line != operation.line for op in self.graph.operations[index + 1 :])
        match = _ASSIGNMENT.match(operation.line.text) if operation.line and last else None
        base = match.group(1) if match else c_identifier(outputs[0]) if outputs else operation.name.removeprefix("_to_")
        while self.names[base] and (numbered := f"{base}_{self.names[base]}") in self.names:
            self.names[base] += 1
        name = numbered if self.names[base] else base
        if base in CALLS or base in INFIX or base in FUNCTIONS:
            name = f"{base}_{self.names[base] + 1}"
        self.names[base] += 1
        self.names[name] += 1
        return name

    def _c_type(self, operation: Operation) -> str:
        if operation.dtype not in C_TYPES:
            raise self._refusal(operation, f"gives {operation.dtype}, which kernels do not compute in")
        return "real" if operation.dtype == self.dtype else C_TYPES[operation.dtype]

    def _expression(self, operation: Operation) -> str:
        name, args, options, dtype = operation.name, operation.args, operation.options, operation.dtype
        self._c_type(operation)
        if name in IDENTITIES:
            return self._operand(args[0], dtype)
        if name in CONSTANTS:
            return literal(CONSTANTS[name], dtype)
        if name in FILLS:
            return literal(args[FILLS[name]], dtype)
        if any(isinstance(arg, list | tuple) for arg in args):  # a list holds dimensions, such as those of a mean
            raise self._refusal(operation, f"of {dtype} is no elementwise operation that kernels can print")
        operand_dtype = self._common_dtype(args) if name in COMPARISONS else dtype
        alpha = options.get("alpha", 1)
        if name == "pow":
            base = self._operand(args[0], dtype)
            function = f"pow_({base}, {self._operand(args[1], dtype)})"
            return _power(base, None if isinstance(args[1], Value) else args[1], function)
        if name == "where":
            condition = self._operand(args[0], torch.bool)
            return FUNCTIONS[name](condition, *(self._operand(a, dtype) for a in args[1:]))
        if name == "masked_fill":
            value, mask, fill = args
            return FUNCTIONS[name](
                self._operand(value, dtype), self._operand(mask, torch.bool), self._operand(fill, dtype)
            )
        if name in ("add", "sub", "rsub") and alpha != 1:
            first, second = (self._operand(a, dtype) for a in args)
            scaled = f"{literal(alpha, dtype)} * {second if name != 'rsub' else first}"
            return f"({second if name == 'rsub' else first} {'+' if name == 'add' else '-'} {scaled})"
        printed = tuple(
            None if a is None else self._operand(a, torch.bool if isinstance(a, bool) else operand_dtype) for a in args
        )
        if name == "mul" and dtype == self.dtype and literal(1.0, dtype) in printed:
            return str(printed[1] if printed[0] == literal(1.0, dtype) else printed[0])
        if name == "reciprocal" and self._is_at_least_one(args[0]):
            return f"reciprocal_({printed[0]})"
        if name in INFIX and not options.get("rounding_mode"):
            return f"({printed[0]} {INFIX[name]} {printed[1]})"
        if name in FUNCTIONS:
            keywords = {k: self._operand(v, dtype) for k, v in options.items() if k == "value"}
            return FUNCTIONS[name](*printed, **keywords)
        if name == "copy":
            return self._operand(args[1], dtype)
        if name in CALLS and dtype.is_floating_point and not any(v is not None for v in options.values()):
            return f"{name}_({', '.join(a for a in printed if a is not None)})"
        raise self._refusal(operation, f"of {dtype} is no elementwise operation that kernels can print")

    def _operand(self, arg: Any, dtype: torch.dtype) -> str:
        """An argument as a C expression of the dtype."""
        if not isinstance(arg, Value):
            return literal(arg, dtype)
        expression = self.expressions[arg.index]
        arg_dtype = self.dtype if arg.index < 0 else self.graph.operations[arg.index].dtype
        if arg_dtype == dtype:
            return expression
        return f"{'real' if dtype == self.dtype else C_TYPES[dtype]}({expression})"

    def _is_at_least_one(self, value: Any) -> bool:
        """Whether a value is at least 1 or not a number, as 1 plus a square in the gradients of many surrogates."""
        if not isinstance(value, Value) or value.index < 0:
            return False
        operation = self.graph.operations[value.index]
        if operation.name != "add" or operation.options.get("alpha", 1) != 1 or operation.dtype != self.dtype:
            return False
        numbers = [a for a in operation.args if not isinstance(a, Value)]
        terms = [self.graph.operations[a.index] for a in operation.args if isinstance(a, Value) and a.index >= 0]
        return len(terms) == 1 and [number >= 1 for number in numbers] == [True] and _is_not_negative(terms[0])

    def _common_dtype(self, args: tuple[Any, ...]) -> torch.dtype:
        """The dtype in which torch compares. A Python number counts only if it is of a higher kind than the tensors."""
        kinds = {bool: torch.bool, int: torch.int64, float: self.dtype}
        dtypes = [
            (self.dtype if a.index < 0 else self.graph.operations[a.index].dtype) if isinstance(a, Value)
            else kinds[type(a)]
            for a in args
        ]  # fmt: skip
        return functools.reduce(torch.promote_types, dtypes)

    def _refusal(self, operation: Operation, why: str) -> StepTraceError:
        place = f", at {operation.line}" if operation.line else ", in the gradient that autograd derived"
        return StepTraceError(f"aten::{operation.name} {why}{place}")


def c_identifier(name: str) -> str:
    """A parameter's dotted name as a C identifier."""
    return re.sub(r"\W", "_", name)


def _is_not_negative(operation: Operation) -> bool:
    squared = operation.name == "mul" and operation.args[0] == operation.args[1]
    return squared or operation.name in ("square", "abs", "exp") or (operation.name == "pow" and operation.args[1] == 2)


def _is_wrapped(expression: str) -> bool:
    """Whether one pair of parentheses encloses the whole expression."""
    if not (expression.startswith("(") and expression.endswith(")")):
        return False
    depth = 0
    for position, character in enumerate(expression):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position == len(expression) - 1
    return False
