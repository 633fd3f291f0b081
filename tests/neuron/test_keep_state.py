"""keep_state=False: a call starts from the reset values and leaves no states; everything else is as with it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from neurons import BATCH, CASES, CHANNELS, CONTRACTS, CPU_BACKENDS, STEPS, Case, current, weights_for
from spikingjelly.activation_based import functional
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from versions import needs_compile

from klif_sj import CLIFNode, FusedNode, KLIFNode
from klif_sj._compat import SPIKINGJELLY_2
from klif_sj.runtime import cpu
from klif_sj.runtime.launch import Pass

needs_compiler = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")


def outcome(node: FusedNode, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    node.zero_grad()
    spike = node(x)
    (spike * weights_for(spike)).sum().backward()
    learned = {name: p.grad for name, p in node.named_parameters() if p.grad is not None}
    return {"spike": spike.detach(), "gradient of x": x.grad, **learned}


@pytest.mark.parametrize(("case", "backend"), CONTRACTS, ids=[f"{case.name}-{backend}" for case, backend in CONTRACTS])
def test_every_call_is_a_call_from_the_reset_values(case: Case, backend: str) -> None:
    keeps, spares = case.make(backend=backend), case.make(backend=backend, keep_state=False)
    for _ in range(2):
        x = current()
        expected = outcome(keeps, x)
        keeps.reset()
        for name, value in outcome(spares, x).items():
            assert_equal(value, expected[name], name)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_state_that_was_not_kept_says_so(backend: str) -> None:
    node = CLIFNode(step_mode="m", backend=backend, keep_state=False)
    assert node.v == 0.0
    node(current())
    for name in node.states:
        with pytest.raises(RuntimeError, match=rf"state '{name}' was not kept.*keep_state=True"):
            getattr(node, name)
    node.reset()
    assert (node.v, node.m) == (0.0, 0.0)


@needs_compiler
@pytest.mark.parametrize("keep", [True, False])
def test_the_kernel_writes_final_states_only_where_they_are_kept(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    launch = cpu.launch

    def noted(work: Pass, record: list[Any]) -> None:
        written.append(sum(address != 0 for address in record[work.layout.at.final]))
        launch(work, record)

    monkeypatch.setattr(cpu, "launch", noted)
    CLIFNode(step_mode="m", backend="cpp", keep_state=keep)(current())
    assert written == [2 if keep else 0]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_given_state_is_where_the_next_call_starts(backend: str) -> None:
    node, reference = (KLIFNode(step_mode="m", backend=backend, keep_state=keep) for keep in (False, True))
    x, v = current(), torch.rand(BATCH, CHANNELS)
    node(x)
    node.v = reference.v = v
    assert_equal(node(x), reference(x))
    reference.reset()
    assert_equal(node(x), reference(x))


USES: dict[str, Callable[[FusedNode], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda node: pickle.loads(pickle.dumps(node)),
    "double": lambda node: node.double().float(),
    "detach_net": functional.detach_net,
    "detach": FusedNode.detach,
    "state_dict": lambda node: node.state_dict(),
    "repr": repr,
    "reset": functional.reset_net,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_tools_work_on_a_neuron_without_states(use: Callable[[FusedNode], Any]) -> None:
    node, x = CASES[1].make(keep_state=False), current()
    expected = node(x)
    result = use(node)
    for other in (node, result if isinstance(result, FusedNode) else node):
        assert_equal(other(x), expected)
        with pytest.raises(RuntimeError, match="not kept"):
            _ = other.v


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_states_at_every_step_may_be_stored(backend: str) -> None:
    node, reference = (KLIFNode(step_mode="m", backend=backend, store_v_seq=True, keep_state=k) for k in (False, True))
    x = current()
    assert_equal(node(x), reference(x))
    assert_equal(node.v_seq, reference.v_seq)


def test_single_steps_are_refused() -> None:
    node = KLIFNode(keep_state=False)
    with pytest.raises(ValueError, match="expected step_mode 'm' with keep_state=False"):
        node(current()[0])
    with pytest.raises(TypeError, match="keep_state: expected True or False, got 1"):
        KLIFNode(keep_state=1)


@pytest.mark.skipif(not SPIKINGJELLY_2, reason="the old line has no explicit states")
def test_explicit_states_are_given_and_returned() -> None:
    node, reference = (CLIFNode(step_mode="m", keep_state=keep) for keep in (False, True))
    x, states = current(), (torch.rand(BATCH, CHANNELS), torch.rand(BATCH, CHANNELS))
    node(current())
    (spikes,), found = node.functional_forward((x,), states)
    (wanted,), expected = reference.functional_forward((x,), states)
    assert_equal(spikes, wanted)
    for actual, value in zip(found, expected, strict=True):
        assert_equal(actual, value)


@needs_compile
@needs_compiler
def test_compiled() -> None:
    net = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), KLIFNode(step_mode="m", keep_state=False))
    x = torch.randn(STEPS, BATCH, CHANNELS)
    found = []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        for _ in range(2):
            net.zero_grad()
            spikes = run(x)
            spikes.sum().backward()
            found.append((spikes, net[0].weight.grad))
    for spikes, gradient in found[1:]:
        assert_equal(spikes, found[0][0])
        assert_close(gradient, found[0][1])
