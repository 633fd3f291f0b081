"""Plans: a later call runs as an earlier one did, until anything but values has changed."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from neurons import (
    BATCH,
    CASES,
    CHANNELS,
    CPU_BACKENDS,
    STEPS,
    Case,
    LeakyIntegrator,
    assert_same_results,
    current,
    train_step,
    weights_for,
)
from spikingjelly.activation_based import neuron, surrogate
from tolerance import assert_equal
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from klif_sj import FusedNode, KLIFNode, fuse
from klif_sj.codegen import PerStep, StepTraceError
from klif_sj.neuron import on_kernels
from klif_sj.runtime import form

pytestmark = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler")

OURS = [case for case in CASES if case.name in ("user-defined", "klif", "clif", "glif")]


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The neurons of the calls that ran without a plan."""
    calls: list[nn.Module] = []
    run = on_kernels.OnKernels._run_anew

    def counted(self: Any, *args: Any) -> Any:
        calls.append(self)
        return run(self, *args)

    monkeypatch.setattr(on_kernels.OnKernels, "_run_anew", counted)
    return calls


def planned(case: Case, **options: Any) -> FusedNode:
    """A node that has a plan for training on ``current()``."""
    node = case.make(backend="cpp", **options)
    train_step(node, current(requires_grad=True))
    node.reset()
    return node


def results_of(node: FusedNode, x: Tensor) -> dict[str, Tensor]:
    """Spikes and every gradient of a loss on them."""
    x = x.detach().requires_grad_()
    spike = node(x)
    leaves = {"x": x, **{name: p for name, p in node.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad((spike * weights_for(spike)).sum(), list(leaves.values()))
    return {"spike": spike.detach(), **dict(zip(leaves, gradients, strict=True))}


def fused(own: nn.Module) -> nn.Module:
    fuse(own, backend="cpp")
    return own


def lif(**options: Any) -> nn.Module:
    return fused(neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan(), **options))


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda case=case: case.make(backend="cpp"), id=case.name) for case in OURS),
        pytest.param(lif, id="LIF"),
        pytest.param(lambda: fused(neuron.ParametricLIFNode(step_mode="m")), id="PLIF"),
    ],
)
def test_further_calls_have_a_plan(make: Callable[[], nn.Module], anew: list[nn.Module]) -> None:
    node = make()
    for count in range(3):
        train_step(node, current(requires_grad=True) + count / 10)
        node.reset()
    assert len(anew) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("keep_state", [True, False])
def test_a_planned_call_takes_the_values_of_its_own_tensors(case: Case, keep_state: bool) -> None:
    node, fresh = (case.make(backend="cpp", keep_state=keep_state) for _ in range(2))
    results_of(node, current())
    node.reset()
    for parameter, other in zip(node.parameters(), fresh.parameters(), strict=True):
        parameter.data.add_(0.05)
        other.data.add_(0.05)
    x = current()
    assert_same_results(results_of(node, x), results_of(fresh, x))


def set_threshold(node: FusedNode) -> None:
    node.v_threshold = 0.4


def set_surrogate(node: FusedNode) -> None:
    node.surrogate_function = surrogate.Sigmoid(alpha=1.5)


def set_alpha(node: FusedNode) -> None:
    node.surrogate_function.alpha = 4.0


def set_method(node: FusedNode) -> None:
    def charge(self: FusedNode, x: Tensor) -> None:
        self.v = self.v * 0.25 + x * self.k

    node.neuronal_charge = types.MethodType(charge, node)


def set_class(node: FusedNode) -> None:
    class Other(type(node)):  # type: ignore[misc]
        def neuronal_fire(self) -> Tensor:
            return self.surrogate_function(self.v - 0.3)

    node.__class__ = Other


def freeze(node: FusedNode) -> None:
    for parameter in node.parameters():
        parameter.requires_grad_(False)


def beyond_its_bound(node: FusedNode) -> None:
    node.k.data.fill_(100.0)


def store(node: FusedNode) -> None:
    node.store_v_seq = True


def start_from_a_number(node: FusedNode) -> None:
    node.v = 0.7


def start_from_a_tensor(node: FusedNode) -> None:
    node.v = torch.linspace(0.0, 0.9, CHANNELS)


@pytest.mark.parametrize(
    "change",
    [set_threshold, set_surrogate, set_alpha, set_method, set_class, freeze, beyond_its_bound, store,
     start_from_a_number, start_from_a_tensor],
)  # fmt: skip
def test_a_plan_ends_with_what_it_was_made_for(change: Callable[[FusedNode], None]) -> None:
    node, fresh = planned(Case("klif", KLIFNode)), KLIFNode(step_mode="m", backend="cpp")
    change(node)
    change(fresh)
    x = current(requires_grad=True)
    expected = train_step(fresh, x)
    assert_same_results(train_step(node, x), expected)
    if change is store:
        assert_equal(node.v_seq, fresh.v_seq)


def channels_last() -> Tensor:
    return torch.rand(STEPS, CHANNELS, BATCH).transpose(1, 2)


def negative_view() -> Tensor:
    return torch.complex(current(), -current()).conj().imag


INPUTS = {
    "another layout": channels_last,
    "a negative view": negative_view,
    "float64": lambda: current(dtype=torch.float64),
    "bfloat16": lambda: current(dtype=torch.bfloat16),
    "one step expanded": lambda: current()[:1].expand(STEPS, BATCH, CHANNELS),
    "other steps": lambda: current(2, BATCH, CHANNELS),
    "another batch": lambda: current(STEPS, 1, CHANNELS),
    "a parameter": lambda: nn.Parameter(current()),
}


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_another_form(kind: str, case: Case) -> None:
    node, fresh, x = planned(case), case.make(backend="cpp"), INPUTS[kind]().detach()
    assert_same_results(train_step(node, x), train_step(fresh, x))


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_with_and_without_gradients_have_plans_of_their_own(mode: Any, case: Case, anew: list[nn.Module]) -> None:
    node = planned(case)
    for _ in range(2):
        with mode():
            spikes = node(current())
        assert not spikes.requires_grad
        node.reset()
        assert node(current(requires_grad=True)).requires_grad
        node.reset()
    assert len(anew) == 2


class Watched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators_of_a_neuron_that_has_a_plan() -> None:
    node, x = planned(OURS[1]), current(requires_grad=True)
    with Watched() as watched:
        node(x).sum().backward()
    assert {"klif_sj.forward.default", "klif_sj.backward.default"} <= set(watched.names)


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_a_profiler_sees_the_operators_of_a_neuron_that_has_a_plan(watched: str) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), current(requires_grad=True)
    for _ in range(2):
        node(x).sum().backward()
        node.reset()
    with torch.profiler.profile() if watched == "forward" else nullcontext() as forward:
        loss = node(x).sum()
    with torch.profiler.profile() as backward:
        loss.backward()
    profile = forward if watched == "forward" else backward
    assert f"klif_sj::{watched}" in {event.name for event in profile.events()}


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_saved_tensors_that_come_back_in_another_form(case: Case) -> None:
    """A hook may give back the saved tensors as it likes: here as sums of two halves, laid out the other way round."""
    node, fresh = planned(case), case.make(backend="cpp")
    x = torch.rand(STEPS, BATCH, CHANNELS)

    def other_way(tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim < 3 else tensor.transpose(1, 2).contiguous().transpose(1, 2)

    results = []
    for each, hooks in ((node, True), (fresh, False)):
        given = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(other_way, other_way) if hooks else nullcontext():
            results.append(train_step(each, given))
    assert_same_results(*results)


@pytest.mark.parametrize(
    "change", [lambda states: states.mT.contiguous().mT, torch.Tensor.clone], ids=["laid", "copied"]
)
def test_saved_states_that_come_back_in_another_form(change: Callable[[Tensor], Tensor]) -> None:
    """More steps than a segment has are saved as states between segments."""
    node, fresh, x = (*(KLIFNode(step_mode="m", backend="cpp") for _ in range(2)), current(40, BATCH, CHANNELS))

    def changed(tensor: Tensor) -> Tensor:
        return change(tensor) if tensor.shape == (2, 1, BATCH * CHANNELS) else tensor

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(changed, lambda tensor: tensor):
            results = results_of(node, x)
        assert_same_results(results, results_of(fresh, x))
        node.reset()
        fresh.reset()


def test_saved_states_that_come_back_in_another_dtype_are_refused() -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), current(40, BATCH, CHANNELS, requires_grad=True)

    def changed(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.shape == (2, 1, BATCH * CHANNELS) else tensor

    with torch.autograd.graph.saved_tensors_hooks(changed, lambda tensor: tensor):
        spikes = node(x)
    with pytest.raises(ValueError, match=r"saved states: expected .*float32.*, got .*float64"):
        spikes.sum().backward()


def test_a_hook_that_is_registered_later() -> None:
    node = planned(OURS[1])
    node.surrogate_function.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(StepTraceError, match="hooks are registered on 'surrogate_function'"):
        node(current())


def quiet(self: FusedNode, x: Tensor) -> Tensor:
    self.v = self.v + x
    return torch.zeros_like(x)


@pytest.mark.parametrize("where", ["class", "node"])
def test_a_whole_step_that_is_replaced(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = planned(OURS[1])
    if where == "class":
        monkeypatch.setattr(KLIFNode, "one_step", quiet)
    else:
        monkeypatch.setattr(node, "one_step", types.MethodType(quiet, node))
    assert not node(current()).any()


def test_inputs_that_need_a_gradient_in_turn(anew: list[nn.Module]) -> None:
    node = KLIFNode(step_mode="m", backend="cpp")
    for count in range(6):
        node(current(requires_grad=count % 2 == 0))
        node.reset()
    assert len(anew) == 2


def test_shapes_that_are_symbols() -> None:
    x = current()
    graph = make_fx(lambda x: KLIFNode(step_mode="m", backend="cpp")(x), tracing_mode="symbolic")(x)
    assert_equal(graph(x), KLIFNode(step_mode="m", backend="cpp")(x))


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_gradients_of_another_form(case: Case) -> None:
    node, x = planned(case), current(requires_grad=True)
    leaves = [x, *node.parameters()]

    def gradients(weight: Tensor) -> list[Tensor]:
        node.reset()
        return list(torch.autograd.grad(node(x), leaves, weight))

    dense = gradients(torch.ones(STEPS, BATCH, CHANNELS))
    for other in (torch.ones(()).expand(STEPS, BATCH, CHANNELS), torch.ones(STEPS, CHANNELS, BATCH).transpose(1, 2)):
        for actual, expected in zip(gradients(other), dense, strict=True):
            assert_equal(actual, expected)


class StepsAndChannels(FusedNode):
    """Its parameters of steps come first here and last in a kernel; there are as many steps as channels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.of_steps, self.of_channels = (nn.Parameter(torch.linspace(*ends, STEPS)) for ends in ((-1, 1), (2, 0)))

    def effective_parameters(self) -> dict[str, Any]:
        return {"of_steps": PerStep(self.of_steps.sigmoid()), "of_channels": self.of_channels.sigmoid()}

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * self.effective.of_steps + self.effective.of_channels * x


def test_parameters_come_in_the_kernels_order() -> None:
    node, fresh = (StepsAndChannels(step_mode="m", backend="cpp") for _ in range(2))
    x = current(STEPS, BATCH, STEPS)
    results_of(node, x)
    node.reset()
    assert_same_results(results_of(node, x), results_of(fresh, x))


class ByStepOrChannel(FusedNode):
    """Its weights, reversed, which no kernel can do, are those of the steps or those of the channels."""

    def __init__(self, by_step: bool, **options: Any) -> None:
        super().__init__(**options)
        self.by_step, self.weights = by_step, nn.Parameter(torch.linspace(0.5, 1.5, STEPS))

    def effective_parameters(self) -> dict[str, Any]:
        weights = self.weights.flip(0)
        return {"weights": PerStep(weights) if self.by_step else weights}

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * 0.5 + self.effective.weights * x


def test_an_effective_parameter_that_turns_from_steps_to_channels() -> None:
    node, fresh = (ByStepOrChannel(by_step, step_mode="m", backend="cpp") for by_step in (True, False))
    x = current(STEPS, BATCH, STEPS)
    results_of(node, x)
    node.reset()
    node.by_step = False
    assert_same_results(results_of(node, x), results_of(fresh, x))


def test_zero_of_either_sign_is_one_start() -> None:
    node, x = LeakyIntegrator(step_mode="m", backend="cpp", v_reset=None), torch.full((1, BATCH, CHANNELS), -0.0)
    for start in (-0.0, 0.0):
        node.v = start
        node(x)
        assert not node.v.signbit().any()
        node.reset()


def test_a_neuron_keeps_few_plans() -> None:
    node = planned(OURS[1])
    for batch in range(1, 2 * on_kernels.MOST_PLANS):
        node(current(STEPS, batch, CHANNELS))
    assert 0 < len(on_kernels._plans[node]) <= on_kernels.MOST_PLANS


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_a_plan_keeps_no_neuron_alive_and_copies_have_none(case: Case) -> None:
    node = planned(case)
    twin = copy.deepcopy(node)
    assert node in on_kernels._plans
    assert twin not in on_kernels._plans
    gone = weakref.ref(node)
    del node
    gc.collect()
    assert gone() is None


def test_a_torch_without_the_guard_makes_no_plans(monkeypatch: pytest.MonkeyPatch, anew: list[nn.Module]) -> None:
    monkeypatch.setattr(form, "_Guards", None)
    node = planned(OURS[1])
    x = current()
    assert_same_results(train_step(node, x), train_step(OURS[1].make(backend="cpp"), x))
    assert len(anew) == 3
    assert node not in on_kernels._plans
