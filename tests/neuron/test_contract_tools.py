"""What every neuron of the package promises: SpikingJelly's and torch's tools work on it, and mistakes are refused."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from neurons import (
    BATCH,
    CASES,
    CHANNELS,
    STEPS,
    Case,
    assert_memories,
    assert_same_results,
    current,
    snapshot,
    states_of,
    train_step,
)
from spikingjelly.activation_based import base, functional, layer, monitor
from tolerance import assert_close, assert_equal
from torch import nn
from versions import TRACED_BY_DYNAMO, needs_compile

import klif_sj
from klif_sj import FusedNode
from klif_sj._compat import SPIKINGJELLY_2

# SpikingJelly's tools


def test_monitors(case: Case, backend: str) -> None:
    node, x = case.make(backend=backend, store_v_seq=True), current()
    net = nn.Sequential(nn.Identity(), node)
    monitors = {
        "spike": monitor.OutputMonitor(net, FusedNode),
        "v": monitor.AttributeMonitor("v", False, net, type(node)),
        "v_seq": monitor.AttributeMonitor("v_seq", False, net, FusedNode),
    }
    spike = net(x)
    seen = {"spike": spike, "v": node.v, "v_seq": node.v_seq}
    for name, expected in seen.items():
        assert monitors[name].monitored_layers == ["1"]
        assert_equal(monitors[name]["1"][0], expected, name)
        monitors[name].remove_hooks()


def test_step_mode_and_backend_of_a_network(case: Case, backend: str) -> None:
    net = nn.Sequential(layer.Linear(CHANNELS, CHANNELS), case.make(backend=backend))
    functional.set_step_mode(net, "s")
    assert net[1].step_mode == "s"
    assert net(current(BATCH, CHANNELS)).shape == (BATCH, CHANNELS)
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert net(current()).shape == (STEPS, BATCH, CHANNELS)
    if not SPIKINGJELLY_2:
        functional.set_backend(net, "auto", FusedNode)
        assert net[1].backend == "auto"
    with pytest.raises(ValueError, match="step_mode"):
        net[1].step_mode = "x"


def test_containers(case: Case, backend: str) -> None:
    x = current(STEPS, BATCH, CHANNELS, 4, 4)
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    multi = nn.Sequential(layer.SeqToANNContainer(convolution), case.make(backend=backend))
    expected = multi(x)
    assert_equal(expected, case.make(backend=backend)(torch.stack([convolution(step) for step in x])))
    wrapped = layer.MultiStepContainer(nn.Sequential(convolution, case.make(backend=backend, step_mode="s")))
    assert_equal(wrapped(x), expected)


@pytest.mark.skipif(not SPIKINGJELLY_2, reason="SpikingJelly 2's functional interface")
def test_functional_forward(case: Case, backend: str) -> None:
    x, node = current(), case.make(backend=backend)
    memories = tuple(base.extract_memories(node))
    expected, final = node(x), snapshot(node)
    node.reset()

    for module in (node, nn.Sequential(nn.Identity(), node)):
        (spike,), updated = base.to_functional_forward(module)((x,), memories)
        assert_equal(spike, expected)
        assert tuple(base.extract_memories(node)) == memories
        base.load_memories(node, list(updated))
        assert_memories(node, final)
        node.reset()

    node.step_mode = "s"
    forward, states, steps = base.to_functional_forward(node), memories, []
    for step in x:
        (spike,), states = forward((step,), states)
        steps.append(spike)
    assert_equal(torch.stack(steps), expected)
    assert_close(states[0], final["v"])

    with pytest.raises(ValueError, match=r"state 'v'.*expected a shape that broadcasts"):
        forward((x[0],), (torch.zeros(1, 2), *memories[1:]))


# Copies


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))], ids=["deepcopy", "pickle"]
)
def test_copies(case: Case, backend: str, clone: Callable) -> None:
    node, x = case.make(backend=backend, store_v_seq=True), current(requires_grad=True)
    node(x).sum().backward()
    twin = clone(node)
    before = states_of(node)
    for name, state in states_of(twin).items():
        assert_equal(state, before[name], name)
    assert twin(x).shape == x.shape
    for name, state in before.items():
        assert getattr(node, name) is state
    functional.reset_net(node)
    functional.reset_net(twin)
    assert_same_results(train_step(twin, x), train_step(node, x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in node.parameters()}


def test_state_dict(case: Case, backend: str) -> None:
    node, fresh, x = case.make(backend=backend), case.make(backend=backend), current()
    with torch.no_grad():
        for parameter in node.parameters():
            parameter.add_(0.25)
    node(x)
    assert node.state_dict().keys() == dict(node.named_parameters()).keys()
    file = io.BytesIO()
    torch.save(node.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    node.reset()
    assert_same_results(train_step(fresh, x), train_step(node, x))


# torch's tools


@needs_compile
def test_compile(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), case.make(backend=backend))
    compiled, x = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager"), current()
    for _ in range(2):
        expected = train_step(net, x)
        actual = {name.replace("_orig_mod.", ""): value for name, value in train_step(compiled, x).items()}
        assert_same_results(actual, expected)
        functional.reset_net(net)
        functional.reset_net(compiled)


@pytest.mark.skipif(TRACED_BY_DYNAMO, reason="this torch takes neurons into its graphs")
def test_compile_by_a_torch_that_cannot_trace_a_neuron(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    net, x = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), case.make(backend=backend)), current()
    expected = net(x)
    functional.reset_net(net)
    assert_equal(torch.compile(net, backend="aot_eager")(x), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="FusedNode.multi_step_forward"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(case: Case, backend: str, dtype: torch.dtype) -> None:
    x, linear, node = current(), nn.Linear(CHANNELS, CHANNELS), case.make(backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        middle = linear(x)
        spike = node(middle)
    assert middle.dtype == spike.dtype == dtype
    assert {state.dtype for state in states_of(node).values()} == {torch.float32}
    spike.float().mean().backward()
    assert_equal(spike.detach(), case.make(backend=backend)(middle.detach().float()).to(dtype))
    assert linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.abs().sum() > 0
    assert torch.isfinite(linear.weight.grad).all()


# Bad input


BAD_INPUTS = {
    "list": ([[1.0]], TypeError, r"expected a tensor \[T, N, \*\], got list"),
    "integers": (torch.ones(STEPS, BATCH, CHANNELS, dtype=torch.int64), TypeError, "floating-point.*got torch.int64"),
    "complex": (torch.ones(STEPS, BATCH, dtype=torch.complex64), TypeError, "floating-point.*got torch.complex64"),
    "0-dimensional": (torch.tensor(1.0), ValueError, r"expected an input \[T, N, \*\].*got shape \(\)"),
    "no batch": (torch.ones(STEPS), ValueError, r"expected an input \[T, N, \*\].*got shape"),
    "T = 0": (torch.ones(0, BATCH, CHANNELS), ValueError, "at least one time step.*got shape"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_refused_and_changes_nothing(case: Case, backend: str, bad: str) -> None:
    x, error, message = BAD_INPUTS[bad]
    node, good = case.make(backend=backend), current()
    node(good)
    before = snapshot(node)
    with pytest.raises(error, match=message) as raised:
        node(x)
    assert type(node).__name__ in str(raised.value)
    assert_memories(node, before)


def test_a_single_step_without_a_batch_is_refused(case: Case, backend: str) -> None:
    node = case.make(backend=backend, step_mode="s")
    with pytest.raises(ValueError, match=r"expected an input \[N, \*\] in step_mode='s', got shape \(\)"):
        node(torch.tensor(1.0))


def test_wrong_options_are_refused(case: Case, backend: str) -> None:
    for option, value, error in [
        ("step_mode", "x", ValueError),
        ("backend", "x", ValueError),
        ("backend", True, (TypeError, ValueError)),
        ("store_v_seq", 1, TypeError),
    ]:
        with pytest.raises(error, match=option):
            case.make(**{option: value})
    node = case.make(backend=backend)
    with pytest.raises(ValueError, match="'torch'"):
        node.backend = "x"
    assert node.backend == backend


def test_every_exported_neuron_is_here() -> None:
    exported = {
        value
        for value in (getattr(klif_sj, name) for name in klif_sj.__all__)
        if inspect.isclass(value) and issubclass(value, FusedNode) and value is not FusedNode
    }
    assert exported <= {type(case.make()) for case in CASES}
