"""The operators under PyTorch's own tools: opcheck, torch.compile, checkpointing, anomaly of a second derivative."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from neurons import CASES, CPU_BACKENDS, STEPS, Case
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from versions import needs_compile

from klif_sj import FusedNode, KLIFNode, LearnableATan, runtime
from klif_sj.codegen import Program
from klif_sj.neuron.parameters import PerStep
from klif_sj.runtime.launch import address

pytestmark = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")

FIRST_OF_CLASS = [c for i, c in enumerate(CASES) if c.neuron not in [earlier.neuron for earlier in CASES[:i]]]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(STEPS, 3, 5).mul(2).to(dtype).requires_grad_()


def operator_arguments(node: FusedNode, x: Tensor, carried: bool) -> tuple[Any, ...]:
    """What the forward operator is called with for a node."""
    program = node.program()
    effective = node.effective_parameters()
    values = {n: v.values if isinstance(v, PerStep) else v for n, v in effective.items()} | dict(
        node.named_parameters()
    )
    initial = [torch.rand(x.shape[1:]).requires_grad_() for _ in node.states] if carried else []
    numbers = [] if carried else [0.0] * len(node.states)
    parameters = [values[name].detach().clone().requires_grad_() for name in program.names]
    return program.text, x, initial, numbers, parameters, node.channel_dim, 0, node.store_v_seq, True


@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("case", FIRST_OF_CLASS, ids=lambda case: case.name)
def test_opcheck(case: Case, carried: bool) -> None:
    """Schema, autograd registration, fake implementation and AOT dispatch agree with what the operators do."""
    node = case.make(backend="cpp")
    node(inputs())
    arguments = operator_arguments(node, inputs(), carried)
    torch.library.opcheck(torch.ops.klif_sj.forward.default, arguments)
    torch.library.opcheck(torch.ops.klif_sj.forward.default, (*arguments[:-1], False))
    program, x, initial, numbers, parameters, channel_dim, *_ = arguments
    detached = [t.detach() for t in parameters]
    spikes, *states, checkpoints = torch.ops.klif_sj.forward(*arguments)
    gradients = [None, *(torch.randn_like(s) for s in states[1:])]
    torch.library.opcheck(
        torch.ops.klif_sj.backward.default,
        (program, x.detach(), [t.detach() for t in initial], numbers, detached, checkpoints.detach(),
         torch.randn_like(spikes), gradients, [], channel_dim, True),
    )  # fmt: skip


def test_registered_autograd_equals_the_eager_one() -> None:
    """Compiled graphs differentiate the operator as registered; eager calls take a shorter way to the same kernel."""
    node = KLIFNode(step_mode="m", backend="cpp")
    x = inputs()
    node(x)
    arguments = operator_arguments(node, x, carried=True)
    leaves = [x, *arguments[2], *arguments[4]]
    spikes, v, _ = torch.ops.klif_sj.forward(*arguments)
    expected = torch.autograd.grad((spikes * 2).sum() + (v**2).sum(), leaves)
    spikes, (v,), _ = runtime.run(Program.decode(arguments[0]), *arguments[1:6], True, *arguments[7:])
    for actual, value in zip(torch.autograd.grad((spikes * 2).sum() + (v**2).sum(), leaves), expected, strict=True):
        assert_equal(actual, value)


@needs_compile
@pytest.mark.parametrize("case", FIRST_OF_CLASS, ids=lambda case: case.name)
def test_compiled_by_inductor(case: Case) -> None:
    """A network with generated kernels compiles to one graph and trains as it does eagerly."""
    torch.manual_seed(0)
    body = nn.Linear(5, 5)
    node = case.make(backend="cpp")
    node(torch.zeros(STEPS, 3, 5))
    x = inputs()

    def losses(forward: Any) -> tuple[Tensor, list[Tensor]]:
        node.reset()
        out = forward(x)
        learned = [body.weight, *(p for p in node.parameters() if p.requires_grad)]
        grads = torch.autograd.grad((out * out.detach().cos()).sum() + node.v.sum(), [x, *learned])
        return out.detach(), list(grads)

    def network(x: Tensor) -> Tensor:
        return node(body(x)) * 0.5

    expected, expected_grads = losses(network)
    actual, actual_grads = losses(torch.compile(network, fullgraph=True))
    assert_close(actual, expected)
    for grad, value in zip(actual_grads, expected_grads, strict=True):
        assert_close(grad, value)


@needs_compile
def test_compiled_graph_follows_a_changed_constant() -> None:
    """A compiled neuron whose tau or surrogate is changed is compiled again, not run with the old kernel."""
    node = KLIFNode(step_mode="m", backend="cpp")
    compiled = torch.compile(node, fullgraph=True, backend="aot_eager")
    x = torch.randn(STEPS, 3, 5).mul(2)
    first = compiled(x)
    for name, value in (("tau", 3.5), ("v_threshold", 0.25)):
        setattr(node, name, value)
        node.reset()
        actual = compiled(x)
        node.reset()
        node.backend = "torch"
        assert_equal(actual, node(x))
        node.backend = "cpp"
        assert not torch.equal(actual, first)


@needs_compile
def test_compiled_with_a_learnable_surrogate() -> None:
    node = KLIFNode(step_mode="m", backend="cpp", surrogate_function=LearnableATan(k=1.5))
    x, gradients = inputs(), []
    for forward in (node, torch.compile(node, fullgraph=True, backend="aot_eager")):
        node.reset()
        gradients.append(torch.autograd.grad(forward(x).sum(), [x, node.k, node.surrogate_function.k]))
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """Recomputing a segment that starts from a reset gives the same gradients."""
    node, x = KLIFNode(step_mode="m", backend="cpp"), inputs()

    def segment(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    expected = torch.autograd.grad(segment(x).square().sum(), [x, node.k])
    node.k.grad = x.grad = None
    checkpoint(segment, x, use_reentrant=reentrant).square().sum().backward()
    assert_equal(x.grad, expected[0])
    assert_equal(node.k.grad, expected[1])


@pytest.mark.parametrize("steps", [STEPS, 40], ids=["short", "with checkpoints"])
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_checkpointed_where_only_one_pass_is_watched(watched: str, steps: int) -> None:
    """What is saved must not depend on who watches: activation checkpointing compares it between the passes."""
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(steps, 3, 5, requires_grad=True)

    def segment(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    expected = torch.autograd.grad(segment(x).square().sum(), [x, node.k])
    with FlopCounterMode(display=False) if watched == "forward" else nullcontext():
        loss = checkpoint(segment, x, use_reentrant=False).square().sum()
    with FlopCounterMode(display=False) if watched == "backward" else nullcontext():
        loss.backward()
    assert_equal(x.grad, expected[0])
    assert_equal(node.k.grad, expected[1])


@needs_compile
def test_compiled_with_the_number_of_steps_as_a_symbol() -> None:
    node = KLIFNode(step_mode="m", backend="cpp")
    compiled = torch.compile(node, backend="aot_eager", fullgraph=True)
    for steps in (8, 17, 40):
        x = torch.randn(steps, 3, 5, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        found = []
        for run in (compiled, node):
            node.reset()
            found += torch.autograd.grad(run(x).square().sum(), x)
        assert_equal(*found)


def test_second_derivative_is_refused() -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp", k_bounds=None), inputs()
    (grad,) = torch.autograd.grad(node(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; use backend='torch'"):
        grad.sum().backward()


def test_the_backward_pass_keeps_the_input_and_nothing_else() -> None:
    """Saved for backward: x itself, without a copy, and what is smaller than a step by far."""
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(STEPS, 64, 32, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        node(x)
    large = [t for t in saved if t.numel() >= x[0].numel()]
    assert [address(t) for t in large] == [address(x)]
    assert sum(t.numel() for t in saved) <= x.numel() + 8


def test_inference_saves_nothing() -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(STEPS, 8, 4)
    with torch.no_grad():
        assert node(x).grad_fn is None
    node.reset()
    with torch.inference_mode():
        assert node(x).is_inference()


OPERATORS = {"klif_sj::forward", "klif_sj::backward"}


def test_a_profiler_sees_the_operators() -> None:
    """A call that nobody watches goes round the dispatcher; one that somebody watches does not."""
    node = KLIFNode(step_mode="m", backend="cpp")
    with torch.profiler.profile() as profile:
        node(inputs()).sum().backward()
    assert {event.key for event in profile.key_averages()} >= OPERATORS


def test_a_dispatch_mode_sees_the_operators() -> None:
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    node = KLIFNode(step_mode="m", backend="cpp")
    with Watch():
        node(inputs()).sum().backward()
    assert seen >= OPERATORS


class Watched(Tensor):
    """Sees the operators that are called with it."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    seen: ClassVar[set[str]] = set()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.add(func._schema.name)
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["x", "state", "parameter"])
def test_a_tensor_of_another_class_sees_the_operators(which: str) -> None:
    """Only a plain tensor is known to have its values in memory: whatever else there is in a call is asked."""
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(STEPS, 3, 5)
    if which == "parameter":
        node.effective_parameters = lambda: {"k": node.k.detach().as_subclass(Watched)}
    if which == "state":
        node.v = torch.zeros(3, 5).as_subclass(Watched)
    Watched.seen.clear()
    node(x.as_subclass(Watched) if which == "x" else x)
    assert "klif_sj::forward" in Watched.seen


def test_fake_tensors_pass() -> None:
    with FakeTensorMode():
        node = KLIFNode(step_mode="m", backend="cpp")
        node.k = nn.Parameter(torch.rand(()))  # of no known value, as a parameter of a model that is only planned
        assert node(torch.empty(STEPS, 3, 5)).shape == (STEPS, 3, 5)


def test_source_is_shown_for_a_length_and_a_dtype() -> None:
    text = KLIFNode().cuda_source(4, torch.float16)
    assert text.startswith("// KLIFNode(")
    assert "constexpr int T = 4;" in text
    assert "self.v = self.v + (x - (self.v - v_reset)) / self.tau" in text
    assert "const real k = p[0];" in text
    with pytest.raises(ValueError, match="T: expected a number of time steps, at least 1, got 0"):
        KLIFNode().cuda_source(0)
    with pytest.raises(TypeError, match=r"dtype: expected one of .*, got torch.int8"):
        KLIFNode().cuda_source(4, torch.int8)


def test_backends_say_why_they_cannot_serve() -> None:
    assert runtime.unavailable("torch") is None
    for name in runtime.supported_backends():
        assert runtime.unavailable(name) is None
