"""Swaps that change nothing: the same outputs and gradients before and after, and checkpoints that go both ways.

KLIF with ``activation="identity"`` and k = 1 computes what LIF computes, in the same order, so spikes and outputs are
equal bit for bit. Two cases round differently, and are held to the tolerance table on one neuron: 0.0.0.0.14's LIF with
``decay_input=False`` and a tau that is no power of two, which multiplies by 1 - 1/tau; and PLIF with such a tau, which
multiplies by sigmoid(w) instead of dividing by tau. Gradients are sums in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from neurons import CPU_BACKENDS
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spiking_resnet
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import CLIFNode, GLIFNode, KLIFNode, swap_neurons
from klif_sj.swap.neuron_settings import SPIKING_NEURONS

ON_2 = pytest.mark.skipif("GatedLIFNode" not in SPIKING_NEURONS, reason="0.0.0.0.14 does not have it")
LIF_IS = {"activation": "identity", "k": 1}
IF_IS = LIF_IS | {"tau": 2.0**100}
"""So long a time constant that a step's leak is less than the last bit of any potential."""

MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "spiking_resnet18": (partial(spiking_resnet.spiking_resnet18, num_classes=10), (3, 32, 32)),
    "sew_resnet18": (partial(sew_resnet.sew_resnet18, num_classes=10, cnf="ADD"), (3, 32, 32)),
    "CIFAR10Net": (partial(parametric_lif_net.CIFAR10Net, channels=8), (3, 32, 32)),
    "MNISTNet": (partial(parametric_lif_net.MNISTNet, channels=4), (1, 28, 28)),
}
NEURONS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "LIF": (neuron.LIFNode, LIF_IS),
    "LIF, soft reset, tau 3": (partial(neuron.LIFNode, tau=3.0, v_reset=None), LIF_IS),
    "LIF, reset below 0, detached": (partial(neuron.LIFNode, v_reset=-0.1, detach_reset=True), LIF_IS),
    "LIF, whole input, tau 4": (partial(neuron.LIFNode, tau=4.0, decay_input=False), LIF_IS),
    "PLIF, tau 2": (neuron.ParametricLIFNode, LIF_IS),
    "IF": (neuron.IFNode, IF_IS),
    "IF, soft reset": (partial(neuron.IFNode, v_reset=None), IF_IS),
}
# Every model with one kind of neuron, every kind of neuron on one model.
PAIRS = [(model, "LIF") for model in MODELS] + [("MNISTNet", name) for name in NEURONS if name != "LIF"]


def results(net: nn.Module, spikes: list[Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, every neuron's spikes, and gradients of input and weights."""
    net.zero_grad()
    functional.reset_net(net)
    spikes.clear()
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in net.named_parameters() if n.endswith(("weight", "bias"))}
    fired = {f"spikes of neuron {number}": value for number, value in enumerate(spikes)}
    return {"output": y.detach(), **fired, "gradient of x": x.grad, **gradients}


def watched(net: nn.Module) -> list[Tensor]:
    """A list to which every neuron appends its spikes, by hooks that a swap is to keep."""
    spikes: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, neuron.BaseNode):
            module.register_forward_hook(lambda module, args, out: spikes.append(out.detach()))
    return spikes


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(("model", "kind"), PAIRS)
def test_a_swap_that_means_the_same_gives_the_same_network(model: str, kind: str, step_mode: str) -> None:
    build, shape = MODELS[model]
    make, overrides = NEURONS[kind]
    net = build(spiking_neuron=make, v_threshold=0.25, surrogate_function=surrogate.ATan())
    functional.set_step_mode(net, step_mode)
    spikes = watched(net)
    x = torch.rand(*((2, 3) if step_mode == "m" else (3,)), *shape) * 3
    expected = results(net, spikes, x)
    rates = [value.mean() for name, value in expected.items() if name.startswith("spikes")]
    assert len(rates) > 3
    assert all(0 < rate < 1 for rate in rates)
    report = swap_neurons(net, KLIFNode, backend="torch", **overrides)
    assert all(not row.of("changed").keys() - {"learn_tau"} for row in report.rows)
    actual = results(net, spikes, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        (assert_close if name.startswith("gradient") else assert_equal)(actual[name], value, name)
    report.undo()
    assert_equal(results(net, spikes, x)["output"], expected["output"], "output after undo")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_eval_mode_and_every_backend_give_the_same_spikes(backend: str) -> None:
    build, shape = MODELS["MNISTNet"]
    net = build(spiking_neuron=neuron.LIFNode, tau=2.0, v_threshold=0.05).eval()
    functional.set_step_mode(net, "m")
    x = torch.rand(4, 3, *shape) * 5
    with torch.no_grad():
        expected = net(x)
        functional.reset_net(net)
        swap_neurons(net, KLIFNode, backend=backend, **LIF_IS)
        assert_equal(net(x), expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize(
    "old",
    [
        pytest.param(partial(neuron.LIFNode, tau=3.0, decay_input=False), id="LIF, whole input, tau 3"),
        pytest.param(partial(neuron.ParametricLIFNode, init_tau=3.0), id="PLIF, tau 3"),
        pytest.param(
            partial(neuron.ParametricLIFNode, init_tau=1.7, decay_input=False, v_reset=0.2), id="PLIF, tau 1.7"
        ),
    ],
)
def test_where_arithmetic_rounds_differently_potentials_agree(old: Callable[..., nn.Module]) -> None:
    net = nn.Sequential(old(step_mode="m", store_v_seq=True))
    x = torch.randn(6, 5, 20) * 2 + 0.5
    spikes, v_seq = net(x), net[0].v_seq
    swap_neurons(net, KLIFNode, backend="torch", **LIF_IS)
    actual = net(x)
    # One potential within the last bits of the threshold would make the rest of its sequence another one.
    same = (actual == spikes).all(0)
    assert same.float().mean() > 0.97
    assert 0.1 < spikes.mean() < 0.9
    assert_close(net[0].v_seq[:, same], v_seq[:, same], "potential")


def test_upstream_klif_becomes_ours_and_stays_the_same() -> None:
    for options in ({}, {"scale_reset": True, "decay_input": False, "tau": 3.0}):
        net = nn.Sequential(
            nn.Linear(6, 6), neuron.KLIFNode(step_mode="m", surrogate_function=surrogate.ATan(), **options)
        )
        with torch.no_grad():
            net[1].k.fill_(6.5)
        x = torch.randn(5, 4, 6) * 2
        expected = net(x)
        expected.sum().backward()
        gradient, k_gradient = net[0].weight.grad.clone(), net[1].k.grad.clone()
        net.zero_grad()
        (row,) = swap_neurons(net, KLIFNode, backend="torch").rows
        assert not row.of("changed")
        assert row.of("kept")["k_bounds"].new is None
        actual = net(x)
        actual.sum().backward()
        assert_equal(actual, expected)
        assert_close(net[0].weight.grad, gradient)
        assert_close(net[1].k.grad, k_gradient)


@ON_2
def test_upstream_clif_becomes_ours_and_stays_the_same() -> None:
    net = nn.Sequential(SPIKING_NEURONS["ComplementaryLIFNode"](tau=3.0, step_mode="m", store_state_seqs=True))
    x = torch.randn(6, 4, 9) * 2
    expected, m = net(x), net[0].m
    (row,) = swap_neurons(net, CLIFNode, backend="torch").rows
    assert not row.of("changed")
    assert net[0].store_v_seq
    assert_equal(net(x), expected)
    assert_close(net[0].m, m)
    swap_neurons(net, SPIKING_NEURONS["ComplementaryLIFNode"])
    assert net[0].store_state_seqs
    assert_equal(net(x), expected)


@ON_2
@pytest.mark.parametrize("inplane", [None, 5])
def test_upstream_glif_becomes_ours_and_stays_the_same(inplane: int | None) -> None:
    net = nn.Sequential(SPIKING_NEURONS["GatedLIFNode"](T=4, inplane=inplane))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.rand(4, 3, 5, 2, 2) * 2
    expected, state = net(x), copy.deepcopy(net.state_dict())
    (row,) = swap_neurons(net, GLIFNode, backend="torch").rows
    assert row.of("changed").keys() == {"spike"}
    assert row.of("kept").keys() >= {"T", "alpha", "conduct", "surrogate_function"}
    assert (net[0].T, net[0].inplane) == (4, inplane)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert_equal(net(x), expected)
    swap_neurons(net, SPIKING_NEURONS["GatedLIFNode"])
    assert_equal(net(x), expected)


# Checkpoints.


def saved(net: nn.Module, path: Path) -> dict[str, Tensor]:
    torch.save(net.state_dict(), path / "checkpoint.pt")
    return torch.load(path / "checkpoint.pt", weights_only=True)


def model() -> nn.Module:
    return parametric_lif_net.MNISTNet(channels=2, spiking_neuron=neuron.LIFNode)


def test_lif_checkpoints_load_into_a_swapped_network_and_back(tmp_path: Path) -> None:
    """Strictly where the neuron adds nothing; where it does, exactly the keys of the report are missing."""
    source, weights = model(), saved(model(), tmp_path)
    report = swap_neurons(source, CLIFNode)
    assert source.load_state_dict(weights, strict=True).missing_keys == []
    assert report.added_keys == []
    model().load_state_dict(saved(source, tmp_path), strict=True)

    for new, options in ((KLIFNode, {}), (GLIFNode, {"T": 2, "inplane": None})):
        net = model()
        report = swap_neurons(net, new, **options)
        with pytest.raises(RuntimeError, match="Missing key"):
            net.load_state_dict(weights, strict=True)
        told = net.load_state_dict(weights, strict=False)
        assert sorted(told.missing_keys) == sorted(report.added_keys)
        assert told.unexpected_keys == []
        told = model().load_state_dict(saved(net, tmp_path), strict=False)
        assert sorted(told.unexpected_keys) == sorted(report.added_keys)
        assert told.missing_keys == []


def test_a_loaded_checkpoint_gives_the_output_of_its_network(tmp_path: Path) -> None:
    source = model().eval()
    x = torch.rand(3, 1, 28, 28) * 5
    expected = source(x)
    net = model().eval()
    swap_neurons(net, KLIFNode, backend="torch", **LIF_IS)
    net.load_state_dict(saved(source, tmp_path), strict=False)
    assert_equal(net(x), expected)


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        pytest.param("KLIFNode", {}, KLIFNode, id="KLIF"),
        pytest.param("GatedLIFNode", {"T": 3, "inplane": 6}, GLIFNode, id="GLIF", marks=ON_2),
        pytest.param("ComplementaryLIFNode", {}, CLIFNode, id="CLIF", marks=ON_2),
    ],
)
def test_upstream_checkpoints_load_strictly_both_ways(
    theirs: str, options: dict[str, Any], ours: type, tmp_path: Path
) -> None:
    their_net = nn.Sequential(nn.Conv2d(1, 6, 3), SPIKING_NEURONS[theirs](**options))
    with torch.no_grad():
        for parameter in their_net.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.6)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), SPIKING_NEURONS[theirs](**options))
    swap_neurons(net, ours)
    net.load_state_dict(saved(their_net, tmp_path), strict=True)
    assert all(torch.equal(value, their_net.state_dict()[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.25)
    their_net.load_state_dict(saved(net, tmp_path), strict=True)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in their_net.state_dict().items())
