"""SpikingJelly 2's operation counters and energy estimates see a fused neuron as they see SpikingJelly's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from neurons import CHANNELS, CPU_BACKENDS, assert_same_results, glif, states_of, train_step
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from klif_sj import CLIFNode, KLIFNode, _compat, swap_neurons
from klif_sj.runtime import serving_backend
from klif_sj.training.evaluate import count_operations

op_counter = _compat.operation_counters()
pytestmark = pytest.mark.skipif(op_counter is None, reason="SpikingJelly 0.0.0.0.14 has no operation counters")

FUSED = [name for name in ("auto", "cpp") if name in ("auto", *CPU_BACKENDS)]
NEURONS = {"KLIF": KLIFNode, "CLIF": CLIFNode, "GLIF": glif}
ELEMENTS = 4 * 3 * CHANNELS
COUNTERS = "NeuronStateCounter", "ACCounter", "FlopCounter", "MACCounter", "MemoryAccessCounter", "SynOpCounter"


@pytest.fixture(autouse=True)
def _named_backends_warn() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "backend 'cpp' does not serve", RuntimeWarning)
        yield


def network(make: Callable[..., nn.Module], **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(6, CHANNELS), make(**options))
    functional.set_step_mode(net, "m")
    return net


def current() -> Tensor:
    return 3 * torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(1))


def counted(name: str, net: nn.Module, learns: bool = False) -> tuple[dict[Any, int], dict[str, int]]:
    """What a counter counts, by operation, and what it has no rule for."""
    counter, x = getattr(op_counter, name)(), current()
    with torch.set_grad_enabled(learns), op_counter.DispatchCounterMode([counter]) as mode:
        spikes = net(x)
        if learns:
            spikes.sum().backward()
    return dict(counter.get_counts()["Global"]), mode.get_unsupported(counter)


@pytest.mark.parametrize("learns", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("neuron_name", NEURONS)
@pytest.mark.parametrize("name", COUNTERS)
def test_counts_are_those_of_the_equations(name: str, neuron_name: str, backend: str, learns: bool) -> None:
    make = NEURONS[neuron_name]
    assert counted(name, network(make, backend=backend), learns) == counted(
        name, network(make, backend="torch"), learns
    )


def test_floating_point_operations_of_a_step() -> None:
    linear = 2 * ELEMENTS * 6 + ELEMENTS
    for make, operations in ((neuron.LIFNode, 10), (neuron.KLIFNode, 11), (KLIFNode, 11), (CLIFNode, 18)):
        counts, _ = counted("FlopCounter", network(make))
        assert sum(counts.values()) == linear + operations * ELEMENTS, make


@pytest.mark.parametrize("name", COUNTERS)
def test_a_swap_from_lif_to_klif_saves_nothing(name: str) -> None:
    net = network(neuron.LIFNode)
    lif, _ = counted(name, net)
    swap_neurons(net, KLIFNode, backend="auto")
    klif, _ = counted(name, net)
    assert sum(klif.values()) >= sum(lif.values())


def energy(estimate: str, node: nn.Module) -> float:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(1, CHANNELS, 3), node, layer.Conv2d(CHANNELS, 2, 3))
    for parameter in (*net[0].parameters(), *net[2].parameters()):
        nn.init.uniform_(parameter)
    functional.set_step_mode(net, "m")
    return getattr(op_counter, f"estimate_{estimate}_energy")(net.eval(), torch.rand(2, 2, 1, 8, 8)).energy_total_pj


@pytest.mark.parametrize("backend", FUSED)
def test_energy_estimates(backend: str) -> None:
    for estimate, make in (("simple", KLIFNode), ("simple", CLIFNode), ("neuromc_runtime", CLIFNode)):
        assert energy(estimate, make(backend=backend)) == energy(estimate, make(backend="torch")) > 0
    assert energy("simple", KLIFNode(backend=backend)) > energy("simple", nn.Identity())


@pytest.mark.parametrize("estimate", ["lemaire", "spikesim"])
def test_estimates_for_lif_alone_refuse_klif_by_name(estimate: str) -> None:
    for cls in (KLIFNode, neuron.KLIFNode):
        with pytest.raises(ValueError, match="KLIFNode"):
            energy(estimate, cls())


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_results_are_the_same_while_counting(make: Callable[..., Any]) -> None:
    x = torch.randn(4, 3, CHANNELS)
    torch.manual_seed(3)
    node = make(step_mode="m")
    expected = train_step(node, x)
    node.reset()
    with op_counter.DispatchCounterMode([op_counter.FlopCounter()]):
        results = train_step(node, x)
    assert_same_results(results, expected)
    states = {name: value.clone() for name, value in states_of(node).items()}
    node.detach()
    node(x)
    assert all(value.isfinite().all() for value in states.values())


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler here")
def test_a_named_backend_says_that_it_is_not_used() -> None:
    x = torch.rand(2, 3)
    with op_counter.DispatchCounterMode([]):
        with pytest.warns(RuntimeWarning, match="backend 'cpp' does not serve .* a counter"):
            assert serving_backend("cpp", x) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [serving_backend(name, x) for name in ("auto", "torch")] == ["torch", "torch"]
    with op_counter.FunctionCounterMode([]):
        assert serving_backend("auto", x) == "torch"
    with torch.device("cpu"):  # a mode too, but no counter
        assert [serving_backend(name, x) for name in ("auto", "cpp")] == ["cpp", "cpp"]


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler here")
def test_our_own_evaluation_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_operations(network(KLIFNode, backend="cpp"), current(), 3) is not None
