"""swap_neurons refuses what it cannot do before it changes anything, and a failure half-way changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn

from klif_sj import CLIFNode, GLIFNode, KLIFNode, swap_neurons


def network() -> nn.Sequential:
    return nn.Sequential(layer.Linear(3, 3), neuron.LIFNode(), nn.Sequential(neuron.IFNode()))


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no neuron class", {"neuron": nn.ReLU}, TypeError, "class of spiking neurons.*ReLU"),
    ("a neuron, no class", {"neuron": KLIFNode()}, TypeError, "class of spiking neurons"),
    ("a base class", {"neuron": neuron.BaseNode}, TypeError, "class of spiking neurons.*BaseNode"),
    ("a stateful layer", {"neuron": layer.Dropout}, TypeError, "class of spiking neurons"),
    ("unknown override", {"init_kk": 2.0}, TypeError, "KLIFNode has no parameter 'init_kk'; did you mean 'init_k'"),
    ("far from any override", {"zzz": 2.0}, TypeError, "it has scale_reset, tau,"),
    ("refused override", {"tau": 0.5}, ValueError, r"^1 \(LIFNode\): .*above 1, got 0.5"),
    ("override of a wrong type", {"tau": "x"}, TypeError, r"^1 \(LIFNode\): .*expected a number"),
    ("k out of bounds", {"k": 9.0}, ValueError, "init_k: expected a value within"),
    ("no surrogate", {"surrogate_function": "ATan"}, TypeError, "expected a SpikingJelly surrogate, got 'ATan'"),
    ("pattern without a match", {"match": "features.*"}, ValueError, r"'features.\*' matches no neuron.*1 \(LIFNode\)"),
    ("class without a match", {"match": CLIFNode}, ValueError, "CLIFNode.* matches no neuron"),
    ("skip without a match", {"skip": ["1", "nowhere"]}, ValueError, "skip: 'nowhere' matches no neuron"),
    ("match of a layer class", {"match": nn.Linear}, TypeError, "match: expected a class of spiking neurons.*Linear"),
    ("match of a number", {"match": 3}, TypeError, "expected a class, a pattern or a predicate, got 3"),
    ("predicate without a match", {"match": lambda path, node: False}, ValueError, "got none.*not in match"),
    ("nothing left", {"skip": neuron.BaseNode}, ValueError, "got none.*skip asks for it"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused_with_nothing_changed(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    net = network()
    modules = list(net.modules())
    with pytest.raises(error, match=message):
        swap_neurons(net, **({"neuron": KLIFNode} | arguments))
    assert all(now is before for now, before in zip(net.modules(), modules, strict=True))


def test_the_last_neuron_is_checked_before_the_first_is_changed() -> None:
    net = network()
    net[2][0].v_threshold = torch.tensor(1.0, dtype=torch.complex64).numpy()
    with pytest.raises((TypeError, ValueError), match=r"^2.0 \(IFNode\)"):
        swap_neurons(net, KLIFNode)
    assert type(net[1]) is neuron.LIFNode


def test_a_network_without_neurons() -> None:
    with pytest.raises(ValueError, match="got none .the network has no spiking neuron"):
        swap_neurons(nn.Sequential(nn.ReLU()), KLIFNode)


def test_a_neuron_alone_and_what_is_no_network() -> None:
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        swap_neurons(neuron.LIFNode(), KLIFNode)
    with pytest.raises(TypeError, match="expected a network"):
        swap_neurons("net", KLIFNode)


def test_a_network_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = network()
    with pytest.raises(ValueError, match="meta device.*to_empty"):
        swap_neurons(net, KLIFNode)


@pytest.mark.filterwarnings("ignore")
def test_a_neuron_within_torchscript() -> None:
    part = nn.Sequential(neuron.LIFNode(surrogate_function=surrogate.ATan())).eval()
    traced = torch.jit.trace(part, torch.ones(2, 3), check_trace=False)
    net = nn.Sequential(neuron.LIFNode(), traced)
    with pytest.raises(ValueError, match="1.0: .*LIFNode within a TorchScript module"):
        swap_neurons(net, KLIFNode)
    assert type(net[0]) is neuron.LIFNode


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_without_neurons_is_no_obstacle() -> None:
    net = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), neuron.LIFNode())
    swap_neurons(net, KLIFNode)
    assert type(net[1]) is KLIFNode


class Stubborn(list):
    """A list that takes the place of one that refuses entries."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RuntimeError("not this one")


@pytest.mark.parametrize("new", [KLIFNode, GLIFNode])
def test_a_failure_half_way_leaves_the_network_as_it_was(new: type) -> None:
    net = network()
    net[0].mine = Stubborn([net[2][0]])
    net[2].mine = [net[2][0]]
    modules, hooks = list(net.modules()), dict(vars(net[1]))
    x = torch.randn(2, 3)
    expected = net(x)
    net[1].reset()
    net[2][0].reset()
    with pytest.raises(RuntimeError, match="not this one"):
        swap_neurons(net, new)
    assert all(now is before for now, before in zip(net.modules(), modules, strict=True))
    assert vars(net[1]).keys() == hooks.keys()
    assert net[2].mine[0] is net[0].mine[0] is net[2][0]
    assert torch.equal(net(x), expected)


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    with pytest.raises(ValueError, match="backend: expected one of"):
        swap_neurons(net, KLIFNode, backend="triton")
    if "cupy" not in KLIFNode().supported_backends:
        with pytest.raises(ValueError, match="backend 'cupy' cannot serve here"):
            swap_neurons(net, KLIFNode, backend="cupy")


@pytest.mark.parametrize("call", [lambda net: swap_neurons(net), lambda net: swap_neurons(net, KLIFNode, "1")])
def test_signature(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(TypeError, match="argument"):
        call(network())
