"""The parameter groups of an optimizer."""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, LearnableATan, parameter_groups


class Gated(FusedNode):
    """A user's neuron that declares a gate."""

    gate_parameters = ("gate",)

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.leak = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = layer.Conv2d(2, 4, 3)
        self.norm = layer.BatchNorm2d(4)
        self.glif = GLIFNode(T=4, inplane=4)
        self.gate = nn.Parameter(torch.zeros(3))  # a weight: no neuron declares it


def network() -> nn.Sequential:
    return nn.Sequential(
        Block(),
        KLIFNode(),
        CLIFNode(),
        GLIFNode(T=4, inplane=None, gates="none"),
        neuron.LIFNode(surrogate_function=LearnableATan()),
        neuron.ParametricLIFNode(),
        KLIFNode(surrogate_function=LearnableATan()),
        Gated(),
        layer.Linear(5, 6),
    )


WEIGHTS = {"0.conv.weight", "0.conv.bias", "0.norm.weight", "0.norm.bias", "0.gate", "8.weight", "8.bias"}
GATES = {"0.glif.alpha", "0.glif.beta", "0.glif.gamma", "7.gate"}


def groups_by_name(net: nn.Module, **options: float) -> dict[str, dict]:
    return {group["name"]: group for group in parameter_groups(net, **options)}


def test_the_groups_of_a_network() -> None:
    net = network()
    groups = groups_by_name(net, lr=0.1, weight_decay=4e-5)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    members = {key: [names[id(p)] for p in group["params"]] for key, group in groups.items()}
    assert set(members["weights"]) == WEIGHTS
    assert set(members["gates"]) == GATES
    assert set(members["neurons"]) == set(names.values()) - WEIGHTS - GATES
    assert {"1.k", "4.surrogate_function.k", "5.w", "6.k", "6.surrogate_function.k"} <= set(members["neurons"])
    assert sum(map(len, members.values())) == len(names)
    settings = {key: (group["lr"], group["weight_decay"]) for key, group in groups.items()}
    assert settings == {"weights": (0.1, 4e-5), "neurons": (0.1, 0.0), "gates": (pytest.approx(0.01), 0.0)}


def test_the_rate_of_the_gates_can_be_chosen() -> None:
    assert groups_by_name(network(), lr=2.0, gate_lr_ratio=0.25)["gates"]["lr"] == 0.5


def test_an_optimizer_follows_the_groups() -> None:
    """One step of SGD on gradients of 1 from values of 1 shows each parameter's rate and decay."""
    net = network()
    for parameter in net.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameter_groups(net, lr=0.1, weight_decay=0.5), momentum=0.9).step()
    for name, parameter in net.named_parameters():
        expected = 0.85 if name in WEIGHTS else 0.99 if name in GATES else 0.9
        assert torch.allclose(parameter, torch.tensor(expected)), name


def test_empty_groups_are_left_out() -> None:
    assert list(groups_by_name(nn.Linear(2, 2), lr=1.0)) == ["weights"]
    assert list(groups_by_name(KLIFNode(), lr=1.0)) == ["neurons"]
    assert parameter_groups(CLIFNode(), lr=1.0) == []


def test_a_shared_surrogate_is_in_one_group_once() -> None:
    shared = LearnableATan()
    net = nn.Sequential(KLIFNode(surrogate_function=shared), KLIFNode(surrogate_function=shared))
    torch.optim.Adam(parameter_groups(net, lr=0.1))  # refuses a parameter that appears twice
    assert len(groups_by_name(net, lr=0.1)["neurons"]["params"]) == 3


def test_frozen_parameters_are_included() -> None:
    node = GLIFNode(T=4, inplane=2, learn_gates=False)
    assert [len(group["params"]) for group in parameter_groups(node, lr=0.1)] == [5, 3]


def test_uninitialised_parameters_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 3), GLIFNode())
    with pytest.raises(ValueError, match=r"got uninitialised 1\.alpha, .*1\.conduct: call the network once"):
        parameter_groups(net, lr=0.1)
    net(torch.randn(4, 5, 2))
    assert list(groups_by_name(net, lr=0.1)) == ["weights", "neurons", "gates"]
