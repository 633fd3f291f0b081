"""The generator against eager torch: steps composed at random, and what the generated source says."""

from __future__ import annotations

import linecache
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from neurons import current, weights_for
from spikingjelly.activation_based import surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

import klif_sj
from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, runtime

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler"),
]
# The same examples every time; not shrunk, as every attempt would compile two kernels.
examples = partial(settings, derandomize=True, deadline=None, database=None, phases=[Phase.generate])


class Composed(FusedNode):
    """A neuron whose step is written by a test; it has a scalar parameter and one by channel."""

    source: str

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def effective_parameters(self) -> dict[str, Any]:
        return {"gain": self.gain}


def composed(lines: list[str], **options: Any) -> type[Composed]:
    """The class of a neuron with these lines as its charge."""
    body = "\n".join(("p, q = self.effective.gain, self.scale", "v = self.v", *lines))
    source = f"def neuronal_charge(self, x):\n{textwrap.indent(body, '    ')}\n"
    name = f"<step {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(source, name, "exec"), namespace)
    return type("Composed", (Composed,), {"neuronal_charge": namespace["neuronal_charge"], "source": source})


def gradients_and_results(node: FusedNode, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    spike = node(x)
    weights = weights_for(spike) + 1.25
    torch.autograd.backward([spike, node.v], [weights, weights[0].to(node.v.dtype)])
    leaves = {"x": x, **dict(node.named_parameters())}
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"spike": spike.detach(), "v": node.v.detach()}, gradients


def compare(make: Callable[[str], Any], x: Tensor, exact: bool = False) -> None:
    expected, actual = (gradients_and_results(make(backend), x) for backend in ("torch", "cpp"))
    for name, value in expected[0].items():
        (assert_equal if exact else assert_close)(actual[0][name], value, name)
    for name, value in expected[1].items():
        # A parameter's gradient is a sum that may cancel, its error is not: 1 is what the terms are like.
        size = 0.0 if name == "x" else 1.0
        assert_close(actual[1][name] + size, value + size, f"gradient of {name}")


# Steps composed at random

EXACT_UNARY = [
    "(-{a})", "{a}.abs()", "torch.relu({a})", "(0.5 * {a})", "(1.0 - {a})", "({a} / 3.0)", "({a} ** 2)", "({a} ** 3)",
    "{a}.clamp(-0.75, 1.25)", "{a}.clamp(max=0.5)", "F.hardtanh({a})", "F.leaky_relu({a}, 0.1)", "{a}.detach()",
    "({a} >= 0.25).to({a})", "{a}.masked_fill({a} > 0.5, 0.25)", "torch.square({a})",
    "(1.5 / ({a}.abs() + 1.0))", "(({a} > 0.1).long() * {a})", "torch.where({a} > 0.0, 1.0, -0.5).to(x)", "{a}.sign()",
]  # fmt: skip
EXACT_BINARY = [
    "({a} + {b})", "({a} - {b})", "({a} * {b})", "({a} / (1.0 + {b}.abs()))", "torch.maximum({a}, {b})",
    "torch.minimum({a}, {b})", "torch.where({a} > {b}, {a}, 0.5 * {b})", "({a} * ({b} != 0.5))",
    "torch.where(({a} < 0.3) & ({b} > -0.3), {b}, {a})", "torch.where(~({a} <= 0.2) | ({b} == 1.0), {b}, {a})",
    "torch.addcdiv({a}, {b}, {b}.abs() + 1.0, value=0.3)",
]  # fmt: skip
"""Operations that IEEE 754 rounds in one way, so that float32 spikes and states are the same bits."""
OTHER_UNARY = [
    "torch.sigmoid({a})", "torch.tanh({a})", "torch.exp(-{a}.abs())", "torch.log({a}.abs() + 1.0)", "torch.cos({a})",
    "torch.atan({a})", "F.elu({a})", "F.celu({a}, 0.5)", "F.softplus({a})", "F.silu({a})", "torch.erf({a})",
    "torch.rsqrt({a} ** 2 + 1.0)", "torch.expm1(-{a}.abs())", "(({a}.abs() + 1.0) ** 1.5)", "({a} ** 4 * 0.1)",
    "torch.exp2(-{a}.abs())", "torch.sqrt({a}.abs() + 1.0)",
]  # fmt: skip
OTHER_BINARY = [
    "torch.add({a}, {b}, alpha=0.3)", "torch.sub({a}, {b}, alpha=0.3)", "torch.rsub({a}, {b}, alpha=0.3)",
    "torch.addcmul({a}, {a}, {b}, value=0.3)", "torch.lerp({a}, {b}, 0.3)", "torch.atan2({a}, {b}.abs() + 1.0)",
    "torch.hypot({a}, {b} + 0.1)",
]  # fmt: skip
"""The rest: the host's own exp, functions of libraries, and what torch contracts to a fused multiply-add."""
IN_PLACE = [
    "{t} += {a}", "{t} -= 0.5", "{t} *= 0.5", "{t}.sub_({a}).mul_(0.5)", "{t}.neg_()", "{t}.clamp_(-2.0, 2.0)",
    "{t}.masked_fill_({a} > 1.0, 0.5)", "{t}.add_(x, alpha=0.25)", "{t}.copy_({a})", "F.relu_({t})", "{t}.abs_()",
    "{t}.zero_()", "{t}.fill_(0.25)",
]  # fmt: skip


@st.composite
def steps(draw: Callable, unary: list[str], binary: list[str]) -> list[str]:
    """Lines that name intermediate values, change some of them in place, and end with the new potential."""
    names, lines = ["x", "v", "p", "q"], []

    def expression(depth: int) -> str:
        if depth == 0 or draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(names))
        form = draw(st.sampled_from(draw(st.sampled_from([unary, binary]))))
        return form.format(a=expression(depth - 1), b=expression(depth - 1))

    for name in ("a", "b", "new")[: draw(st.integers(1, 3))]:
        lines.append(f"{name} = {expression(2)} + 0.0 * x")  # of the input's shape, and read by nothing yet
        if draw(st.booleans()):
            lines.append(draw(st.sampled_from(IN_PLACE)).format(t=name, a=expression(1)))
        names.append(name)
    return [*lines, f"self.v = ({expression(2)} + {names[-1]}).clamp(-8.0, 8.0)"]


@examples(max_examples=20)
@given(lines=steps(EXACT_UNARY, EXACT_BINARY))
def test_a_composed_step_of_plain_arithmetic(lines: list[str]) -> None:
    cls, x = composed(lines), current(3, 7, 5, 9)
    compare(lambda backend: cls(5, step_mode="m", backend=backend), x, exact=True)


@examples(max_examples=20)
@given(
    lines=steps(EXACT_UNARY + 2 * OTHER_UNARY, EXACT_BINARY + OTHER_BINARY), soft=st.booleans(), smooth=st.booleans()
)
def test_a_composed_step_of_any_operations(lines: list[str], soft: bool, smooth: bool) -> None:
    """In float64, where a rounding error moves no comparison to its other side."""
    cls, x = composed(lines), current(3, 7, 5, 9, dtype=torch.float64)
    options = {"v_reset": None if soft else 0.0, "surrogate_function": surrogate.Sigmoid(spiking=not smooth)}
    compare(lambda backend: cls(5, step_mode="m", backend=backend, **options).double(), x)


@pytest.mark.parametrize(
    "lines",
    [
        ["a = v * 0.5 + x", "F.elu(a, inplace=True)", "self.v = a"],
        ["new, template, exp_ = v * 0.5, x * p, torch.exp(-x.abs())", "T = new + template", "self.v = T * exp_ + new"],
        ["m = x > 0.0", "self.v = v * 0.5 + (m == 2) + (m * 3 == 3) * x + x.int() + (m.to(torch.uint8) >= 0.5)"],
        ["self.v = v * 0.5 + x.sin() \\", "    * p"],
        ["double = x.double()", "self.v = (v.double() * 0.5 + double.sigmoid().clamp(max=0.9)).float() + q"],
        ["self.v = torch.full_like(x, 0.5) + x.new_zeros(x.shape) + torch.ones_like(v) * q * x + torch.zeros(x.shape)"],
    ],
    ids=["in-place elu", "names of C++", "integers", "line continued", "double", "constants"],
)
def test_a_written_step(lines: list[str]) -> None:
    cls = composed(lines)
    compare(lambda backend: cls(5, step_mode="m", backend=backend), current(3, 7, 5, 9))


# Built-in neurons with options at random

COMMON = {"v_threshold": st.floats(0.4, 1.5), "detach_reset": st.booleans(), "tau": st.floats(1.1, 6.0)}
OPTIONS = {
    KLIFNode: COMMON
    | {
        "v_reset": st.none() | st.floats(-0.3, 0.3),
        "scale_reset": st.booleans(),
        "decay_input": st.booleans(),
        "activation": st.sampled_from(["relu", "leaky_relu", "identity"]),
        "init_k": st.floats(0.6, 2.0),
        "learn_k": st.booleans(),
    },
    CLIFNode: COMMON | {"v_reset": st.none() | st.floats(-0.3, 0.3), "decay_input": st.booleans()},
    GLIFNode: {
        "inplane": st.sampled_from([None, 5]),
        "gates": st.sampled_from(["soft", "hard", "none"]),
        "time_wise": st.booleans(),
        "learn_gates": st.booleans(),
        "init_tau": st.floats(0.1, 0.9),
        "init_v_threshold": st.floats(0.3, 0.9),
    },
}


@pytest.mark.parametrize("neuron", OPTIONS, ids=lambda neuron: neuron.__name__)
def test_random_options_and_shapes(neuron: type[FusedNode]) -> None:
    """In float64, in which the host's exp is the library's and no spike is near enough to the threshold to differ."""

    @examples(max_examples=8)
    @given(
        options=st.fixed_dictionaries(OPTIONS[neuron]),
        steps=st.integers(1, 6),
        shape=st.tuples(st.integers(1, 4), st.just(5), st.integers(1, 70)),
    )
    def run(options: dict[str, Any], steps: int, shape: tuple[int, ...]) -> None:
        if neuron is GLIFNode:
            options = options | {"T": steps}

        def make(backend: str) -> FusedNode:
            torch.manual_seed(0)
            return neuron(**options, step_mode="m", backend=backend).double()

        compare(make, current(steps, *shape, dtype=torch.float64))

    run()


# The source


class Leaky(FusedNode):
    """Two states, an effective parameter by channel and a raw one."""

    states = ("v", "trace")

    def __init__(self, leak: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.leak = leak
        self.weight = nn.Parameter(torch.ones(5))
        self.bias = nn.Parameter(torch.tensor(0.1))

    def effective_parameters(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def neuronal_charge(self, x: Tensor) -> None:
        current = self.effective.weight * x + self.bias
        self.v = self.leak * self.v + current

    def neuronal_reset(self, spike: Tensor) -> None:
        self.trace = 0.9 * self.trace + spike
        super().neuronal_reset(spike)


def source_of(node: FusedNode) -> str:
    return node.cuda_source(4, torch.float32)


def test_the_source_reads_as_the_neuron() -> None:
    source = source_of(Leaky())
    header = source[: source.index("#ifdef")]
    assert "Leaky(" in header
    assert "states: v, trace" in header
    assert "weight [C] (learned)" in header
    assert "bias [] (learned)" in header
    assert "T = 4" in header
    step = source[source.index("INLINE void step(") : source.index("INLINE void step_backward(")]
    for line in (
        "const real v = state[0];",
        "const real trace = state[1];",
        "// current = self.effective.weight * x + self.bias",
        "const real current = (weight * x) + bias;",
        "// self.v = self.leak * self.v + current",
        "// self.trace = 0.9 * self.trace + spike",
    ):
        assert line in step
    assert "grad_weight" in source[source.index("INLINE void step_backward(") :]


class Triangle(torch.autograd.Function):
    """A surrogate whose gradient compares a sum with a product in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        near = x.abs() * 3.0 + 0.25 < 1.0
        return torch.where(near, grad * 2.0 + 0.5, grad)


def test_a_product_is_fused_with_its_sum_in_the_gradient_alone() -> None:
    """And not where the step or a comparison needs it, as a last bit may decide there."""
    source = source_of(Leaky(surrogate_function=lambda x: Triangle.apply(x)))
    start, end = source.index("INLINE void step_backward("), source.index("INLINE real prepared(")
    step, gradient = source[source.index("INLINE void step(") : start], source[start:end]
    assert "fma_" not in step
    assert "const real current = (weight * x) + bias;" in step
    assert "const real current = (weight * x) + bias;" in gradient
    assert "* 3.0f) + 0.25f) < 1.0f" in gradient
    assert re.search(r"fma_\(\w+, 2\.0f, 0\.5f\)", gradient)
    assert re.search(r"sum_p\[\d\] = fma_\(\w+, x, sum_p\[\d\]\);  // grad_weight", gradient)
    assert re.search(r"sum_p\[\d\] \+= \w+;  // grad_bias", gradient)


EQUAL = {
    "klif": KLIFNode,
    "clif": CLIFNode,
    "glif": lambda: GLIFNode(4, 5),
    "user": Leaky,
    "function as surrogate": lambda: KLIFNode(surrogate_function=lambda x: x.sigmoid()),
}


@pytest.mark.parametrize("make", EQUAL.values(), ids=EQUAL)
def test_equal_nodes_have_the_same_source_and_it_names_no_place(make: Callable[[], FusedNode]) -> None:
    first, second = source_of(make()), source_of(make())
    assert first == second
    assert "/home/" not in first
    assert str(Path(klif_sj.__file__).parent) not in first


class OtherCharge(KLIFNode):
    def neuronal_charge(self, x: Tensor) -> None:
        super().neuronal_charge(0.5 * x)


class OtherFire(KLIFNode):
    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - 0.5 * self.v_threshold)


class OtherReset(KLIFNode):
    def neuronal_reset(self, spike: Tensor) -> None:
        self.v = self.v * (1.0 - 0.5 * spike)


@pytest.mark.parametrize("cls", [OtherCharge, OtherFire, OtherReset])
def test_a_changed_method_has_its_own_kernel(cls: type[FusedNode]) -> None:
    x = current(2, 3, 5, 7)
    compare(lambda backend: cls(step_mode="m", backend=backend), x, exact=True)
    plain, changed = (gradients_and_results(c(step_mode="m", backend="cpp"), x)[0]["v"] for c in (KLIFNode, cls))
    assert not torch.equal(plain, changed)


def test_a_method_replaced_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Patched(KLIFNode):
        pass

    node, x = Patched(step_mode="m", backend="cpp"), current(2, 3, 5, 7)
    node(x)
    node.reset()
    monkeypatch.setattr(Patched, "neuronal_reset", OtherReset.neuronal_reset)
    assert_equal(node(x), OtherReset(step_mode="m", backend="torch")(x))


CHANGES: dict[str, Callable[[KLIFNode], None]] = {
    "tau": lambda node: setattr(node, "tau", 3.0),
    "v_threshold": lambda node: setattr(node, "v_threshold", 0.6),
    "v_reset": lambda node: setattr(node, "v_reset", None),
    "decay_input": lambda node: setattr(node, "decay_input", False),
    "detach_reset": lambda node: setattr(node, "detach_reset", True),
    "alpha of the surrogate": lambda node: setattr(node.surrogate_function, "alpha", 4.0),
    "another surrogate": lambda node: setattr(node, "surrogate_function", surrogate.Sigmoid()),
    "the surrogate's primitive": lambda node: node.surrogate_function.set_spiking_mode(False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_attribute_counts_at_the_next_call(change: Callable[[KLIFNode], None]) -> None:
    x, node = current(2, 3, 5, 7), KLIFNode(step_mode="m", backend="cpp")
    before, source = gradients_and_results(node, x), source_of(node)
    node.reset()
    node.zero_grad()
    change(node)
    after = gradients_and_results(node, x)
    assert source_of(node) != source
    assert not torch.equal(before[1]["x"], after[1]["x"])
    fresh = KLIFNode(step_mode="m", backend="torch")
    change(fresh)
    expected = gradients_and_results(fresh, x)
    for kind in range(2):
        for name, value in expected[kind].items():
            assert_close(after[kind][name], value, name)


def test_a_list_changed_in_place_counts_at_the_next_call() -> None:
    class Listed(FusedNode):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.weights = [0.5, {"input": 1.0}]
            self.note = torch.zeros(2)

        def neuronal_charge(self, x: Tensor) -> None:
            self.v = self.weights[0] * self.v + self.weights[1]["input"] * x

    node, x = Listed(step_mode="m", backend="cpp"), torch.full((1, 5), 0.5)
    seen = []
    for change in (lambda: None, lambda: node.weights.__setitem__(0, 0.8), lambda: node.weights[1].update(input=0.1)):
        change()
        node.note = torch.ones(2)  # unread, and without a truth value to compare by
        node.v = 0.5
        node(x)
        seen.append(node.v[0].item())
    assert seen == pytest.approx([0.75, 0.9, 0.45])


class InPlace(FusedNode):
    """Writes to its state instead of replacing it."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v += x


class OutOfPlace(FusedNode):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x


def test_a_step_may_write_to_its_state() -> None:
    x, weights = torch.randn(4, 30, requires_grad=True), torch.randn(4, 30)
    results = []
    for neuron in (InPlace, OutOfPlace):
        node = neuron(step_mode="m", backend="cpp")
        spikes = node(x)
        results.append((spikes, node.v, *torch.autograd.grad((spikes * weights).sum(), x)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
