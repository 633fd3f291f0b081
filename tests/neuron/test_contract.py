"""What every neuron of the package promises, on every backend that serves the CPU: its numbers and its gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from neurons import (
    BATCH,
    CHANNELS,
    STEPS,
    Case,
    assert_memories,
    assert_same_results,
    current,
    snapshot,
    states_of,
    step_by_step,
    train_step,
    weights_for,
)
from spikingjelly.activation_based import functional, surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HALF_DTYPES = [torch.float16, torch.bfloat16]
DTYPES = [*HALF_DTYPES, torch.float32, torch.float64]


# Steps and sequences


def test_it_fires_on_a_fair_part_of_the_steps(case: Case, backend: str) -> None:
    rate = case.make(backend=backend)(current(STEPS, 200, CHANNELS)).mean()
    assert 0.1 < rate < 0.9


def test_single_step_equals_multi_step(case: Case, backend: str) -> None:
    x, node = current(), case.make(backend=backend)
    whole = train_step(node, x)
    node.reset()
    assert_same_results(train_step(node, x, lambda x: step_by_step(node, x)), whole)


def test_chunks_equal_the_whole(case: Case, backend: str) -> None:
    node = case.make(backend=backend)
    if node.time_dependent:
        pytest.skip("every sequence starts at the first of this neuron's own time steps")
    x = current()
    whole = train_step(node, x)
    node.reset()
    assert_same_results(train_step(node, x, lambda x: torch.cat([node(x[:1]), node(x[1:])])), whole)


def test_a_time_dependent_neuron_refuses_more_steps_than_it_has(case: Case, backend: str) -> None:
    node = case.make(backend=backend)
    if not node.time_dependent:
        pytest.skip("sequences of any length")
    node(current())
    before = snapshot(node)
    with pytest.raises(ValueError, match=rf"T = {STEPS} time steps.*got {STEPS + 1}"):
        node(current(STEPS + 1, BATCH, CHANNELS))
    assert_memories(node, before)

    node.reset()
    x = current()
    spikes = step_by_step(node, x)
    with pytest.raises(ValueError, match="reset the neuron"):
        node(x[0])
    functional.reset_net(node)
    assert_equal(step_by_step(node, x), spikes)


@pytest.mark.parametrize("shape", [(1, BATCH, CHANNELS), (STEPS, 0, CHANNELS), (STEPS, 1, CHANNELS, 3, 7)], ids=str)
def test_shapes(case: Case, backend: str, shape: tuple[int, ...]) -> None:
    x = current(*shape)
    result = train_step(case.make(backend=backend), x)
    assert result["spike"].shape == result["gradient of x"].shape == shape
    expected = train_step(case.make(backend="torch").double(), x.double())
    assert_equal(result["spike"].double(), expected["spike"])
    assert_close(result["gradient of x"], expected["gradient of x"].float())


def test_strides_do_not_change_the_result(case: Case, backend: str) -> None:
    x = current(STEPS, 2, CHANNELS, 4, 3)
    expected = train_step(case.make(backend=backend), x)
    channels_last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    with_gaps = x.repeat_interleave(2, dim=3)[:, :, :, ::2]
    for other in (channels_last, with_gaps):
        assert not other.is_contiguous()
        assert_same_results(train_step(case.make(backend=backend), other), expected)


# Dtypes and states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_dtypes(case: Case, backend: str, dtype: torch.dtype, step_mode: str) -> None:
    node = case.make(backend=backend, step_mode=step_mode, store_v_seq=True)
    x = current(dtype=dtype, requires_grad=True)
    spike = node(x if step_mode == "m" else x[0])
    spike.sum().backward()
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert spike.dtype == x.grad.dtype == dtype
    assert {state.dtype for state in states_of(node).values()} == {state_dtype}
    assert {getattr(node, f"{name}_seq").dtype for name in node.states} == {state_dtype}
    assert all(parameter.grad.dtype == torch.float32 for parameter in node.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_is_the_float32_computation_rounded(case: Case, backend: str, dtype: torch.dtype) -> None:
    x = current(dtype=dtype)
    rounded = train_step(case.make(backend=backend), x)
    exact = train_step(case.make(backend=backend), x.float())
    for name in ("spike", "gradient of x"):
        exact[name] = exact[name].to(dtype)
    assert_same_results(rounded, exact)


def test_a_half_precision_module_computes_in_float32(case: Case, backend: str) -> None:
    node = case.make(backend=backend)
    node(current())
    spike = node.half()(current(dtype=torch.float16))
    assert spike.dtype == torch.float16
    assert {state.dtype for state in states_of(node).values()} == {torch.float32}


@pytest.mark.parametrize("change", ["shape", "dtype"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_states_are_made_anew(case: Case, backend: str, change: str, step_mode: str) -> None:
    node, fresh = case.make(backend=backend), case.make(backend=backend)
    node.step_mode = fresh.step_mode = step_mode
    first = current() if step_mode == "m" else current(BATCH, CHANNELS)
    second = first.double() if change == "dtype" else torch.cat([first, first], dim=-2)
    node(first)
    assert_equal(node(second), fresh(second))
    assert_memories(node, snapshot(fresh))


def test_states_are_made_anew_on_another_device(case: Case, backend: str) -> None:
    node = case.make(backend=backend)
    node(current())
    node.backend = "torch"
    for tensors in (module._parameters for module in node.modules()):
        tensors.update({name: None if p is None else nn.Parameter(p.to("meta")) for name, p in tensors.items()})
    spike = node(current().to("meta"))
    assert spike.device.type == "meta"
    assert {state.device.type for state in states_of(node).values()} == {"meta"}


def test_states_are_carried_and_reset(case: Case, backend: str) -> None:
    node, x = case.make(backend=backend, store_v_seq=True), current(STEPS, 50, CHANNELS)
    initial = snapshot(node)
    first = node(x)
    carried = node(x)
    assert not torch.equal(first, carried)
    functional.reset_net(node)
    assert snapshot(node) == initial
    assert all(getattr(node, f"{name}_seq") is None for name in node.states)
    assert_equal(node(x), first)


def test_store_v_seq(case: Case, backend: str) -> None:
    x, node = current(), case.make(backend=backend)
    node(x)
    assert node.v_seq is None
    node.reset()
    node.store_v_seq = True
    node(x)
    sequences = {name: getattr(node, f"{name}_seq") for name in node.states}
    for name, sequence in sequences.items():
        assert sequence.shape == x.shape
        assert_equal(sequence[-1], getattr(node, name), name)
    node.reset()
    by_step = []
    node.step_mode = "s"
    for step in x:
        node(step)
        by_step.append(states_of(node))
    for name, sequence in sequences.items():
        assert_close(getattr(node, f"{name}_seq"), sequence, f"{name}_seq")
        assert_close(torch.stack([states[name] for states in by_step]), sequence, name)
    node.store_v_seq = False
    assert node.v_seq is None


# Gradients


def test_gradcheck_on_the_smooth_primitive(case: Case, backend: str) -> None:
    """Against finite differences: from spikes and final states to the input, the initial states, the parameters."""
    if not case.smooth:
        pytest.skip("this gradient is not the derivative, by definition (detached, straight-through)")
    node = case.make(backend=backend, surrogate_function=surrogate.ATan(alpha=2.0, spiking=False)).double()
    names = [name for name, parameter in node.named_parameters() if parameter.requires_grad]

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        initial, parameters = values[: len(node.states)], values[len(node.states) :]
        for name, value in zip(node.states, initial, strict=True):
            setattr(node, name, value)
        spike = torch.func.functional_call(node, dict(zip(names, parameters, strict=True)), (x,))
        return spike, *states_of(node).values()

    x = current(STEPS, 2, CHANNELS, dtype=torch.float64, requires_grad=True)
    initial = [torch.rand(2, CHANNELS, dtype=torch.float64, requires_grad=True) for _ in node.states]
    parameters = [node.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, (x, *initial, *parameters))


def test_gradients_flow_through_the_states(case: Case, backend: str) -> None:
    """From the final states to the initial ones, as in float64 on the torch backend."""
    x, initial = current(STEPS, 50, CHANNELS), torch.rand(50, CHANNELS)
    results = []
    for name, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        node = case.make(backend=name).to(dtype)
        starts = {state: initial.to(dtype, copy=True).requires_grad_() for state in node.states}
        for state, value in starts.items():
            setattr(node, state, value)
        node(x.to(dtype))
        sum((state**2).sum() for state in states_of(node).values()).backward()
        results.append({name: value.grad for name, value in starts.items()})
    for name, gradient in results[1].items():
        assert gradient.abs().max() > 1e-3
        assert_close(results[0][name], gradient.float(), name)


def test_backward_is_linear_in_time(case: Case, backend: str) -> None:
    def graph(steps: int) -> Counter[str]:
        node = case.make(backend=backend, **({"T": steps} if case.make().time_dependent else {}))
        seen, waiting = set(), [node(current(steps, BATCH, CHANNELS, requires_grad=True)).grad_fn]
        while waiting:
            function = waiting.pop()
            if function is not None and function not in seen:
                seen.add(function)
                waiting += [following for following, _ in function.next_functions]
        return Counter(function.name() for function in seen)

    short, middle, long = (graph(steps) for steps in (4, 8, 12))
    # Its backward writes a whole sequence of zeros for every step.
    assert not any("Select" in name for name in long)
    assert sum(long.values()) - sum(middle.values()) == sum(middle.values()) - sum(short.values())


def test_detach_net(case: Case, backend: str) -> None:
    node = case.make(backend=backend, store_v_seq=True)
    x = current(requires_grad=True)
    spike = node(x)
    held, kept = states_of(node), snapshot(node)
    functional.detach_net(node)
    assert all(state.requires_grad for state in held.values())  # what was read from the node before keeps its graph
    for name, state in states_of(node).items():
        assert not state.requires_grad
        assert not getattr(node, f"{name}_seq").requires_grad
        assert_equal(state, kept[name])
    node(current(requires_grad=True)).sum().backward()
    assert x.grad is None
    spike.sum().backward()
    assert x.grad.abs().sum() > 0


def test_detach_net_leaves_the_returned_spike_alone_in_single_step_mode(case: Case, backend: str) -> None:
    node, x = case.make(backend=backend, step_mode="s"), current(BATCH, CHANNELS, requires_grad=True)
    spike = node(x)
    functional.detach_net(node)
    spike.sum().backward()
    assert x.grad.abs().sum() > 0


def test_evaluation_then_training(case: Case, backend: str) -> None:
    node, x = case.make(backend=backend), current()
    expected = train_step(node, x)
    for context in (torch.no_grad, torch.inference_mode):
        functional.reset_net(node)
        with context():
            spike = node.eval()(x)
        assert not spike.requires_grad
        assert_equal(spike, expected["spike"])
        functional.reset_net(node)
        assert_same_results(train_step(node.train(), x), expected)


def test_gradients_exist_in_eval_mode(case: Case, backend: str) -> None:
    x = current()
    assert_same_results(
        train_step(case.make(backend=backend).eval(), x), train_step(case.make(backend=backend).train(), x)
    )


def test_checkpointing_gives_the_same_gradients(case: Case, backend: str) -> None:
    net = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), case.make(backend=backend))

    def from_rest(x: Tensor) -> Tensor:
        functional.reset_net(net)
        return net(x)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        net.zero_grad()
        inner = x.detach().requires_grad_()
        spike = run(inner)
        spike.backward(weights_for(spike))
        return [spike.detach(), inner.grad, *(p.grad for p in net.parameters() if p.requires_grad)]

    x = current()
    expected = gradients(from_rest)
    for checkpointed, plain in zip(
        gradients(lambda x: checkpoint(from_rest, x, use_reentrant=False)), expected, strict=True
    ):
        assert_close(checkpointed, plain)
