"""Models as published repositories write them for SpikingJelly, with other neurons in them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, monitor, neuron, surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import CLIFNode, GLIFNode, KLIFNode, patched, swap_neurons
from klif_sj.runtime import unavailable


class SEWBlock(nn.Module):
    """Deep residual learning in SNNs: neurons made by a callable with keywords, added spikes."""

    def __init__(self, channels: int, spiking_neuron: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.conv1 = layer.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = layer.BatchNorm2d(channels)
        self.sn1 = spiking_neuron(**kwargs)
        self.conv2 = layer.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = layer.BatchNorm2d(channels)
        self.sn2 = spiking_neuron(**kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sn2(self.bn2(self.conv2(self.sn1(self.bn1(self.conv1(x))))))


class PotentialHead(nn.Module):
    """A classifier that reads the output neuron's potential, over a loop of single steps (STBP)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 8), neuron.LIFNode(surrogate_function=surrogate.ATan())
        self.fc2, self.lif2 = nn.Linear(8, 4), neuron.LIFNode(v_threshold=float("inf"))

    def forward(self, x: Tensor, steps: int = 4) -> Tensor:
        for _ in range(steps):
            self.lif2(self.fc2(self.lif1(self.fc1(x))))
        return self.lif2.v


class OwnLIF(neuron.LIFNode):
    """A class of a repository's own."""

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale


@pytest.mark.parametrize("make", [neuron.LIFNode, partial(neuron.LIFNode, tau=3.0)], ids=["class", "partial"])
@pytest.mark.parametrize("cls", [KLIFNode, CLIFNode, partial(GLIFNode, T=4, inplane=3)], ids=["KLIF", "CLIF", "GLIF"])
def test_a_sew_block(make: Any, cls: Any) -> None:
    net = SEWBlock(3, make, surrogate_function=surrogate.ATan(), detach_reset=True)
    functional.set_step_mode(net, "m")
    keywords = cls.keywords if isinstance(cls, partial) else {}
    report = swap_neurons(net, getattr(cls, "func", cls), **keywords)
    assert [row.paths for row in report.rows] == [("sn1",), ("sn2",)]
    if not keywords:
        assert net.sn1.tau == (3.0 if isinstance(make, partial) else 2.0)
    x = torch.rand(4, 2, 3, 8, 8)
    for _ in range(2):
        net(x).mean().backward()
        functional.reset_net(net)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_partial_within_the_block_builds_the_new_neuron() -> None:
    with patched(LIFNode=KLIFNode):
        make = partial(neuron.LIFNode, tau=3.0, backend="torch")
        node = make(step_mode="m")
        assert isinstance(node, neuron.LIFNode)
    assert (type(node), node.tau, node.step_mode, node.backend) == (KLIFNode, 3.0, "m", "torch")


def test_a_model_that_reads_the_potential() -> None:
    torch.manual_seed(0)
    net, x = PotentialHead(), torch.rand(5, 6) * 3
    expected = net(x)
    expected.square().sum().backward()
    gradient = net.fc1.weight.grad.clone()
    functional.reset_net(net)
    net.zero_grad()
    swap_neurons(net, KLIFNode, activation="identity")
    out = net(x)
    out.square().sum().backward()
    assert_close(out, expected)
    assert_close(net.fc1.weight.grad, gradient)
    functional.reset_net(net)
    assert net.lif2.v == 0.0


def test_a_class_of_ones_own_is_left_alone_and_said_to_be() -> None:
    net = nn.Sequential(OwnLIF(scale=2.0), neuron.LIFNode())
    report = swap_neurons(net, KLIFNode)
    assert type(net[0]) is OwnLIF
    assert "name it in match" in report.left_alone["0"]
    row = swap_neurons(net, KLIFNode, match=OwnLIF).rows[0]
    assert row.of("dropped")["scale"].old == 2.0
    with patched(LIFNode=KLIFNode) as patch:

        class Later(neuron.LIFNode):
            pass

        assert isinstance(Later(), Later)
    assert any("derived from LIFNode" in why for why in patch.report.left_alone.values())


def test_monitors_that_models_are_published_with() -> None:
    net = nn.Sequential(layer.Linear(5, 5), neuron.LIFNode(store_v_seq=True), layer.Linear(5, 5), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    swap_neurons(net, KLIFNode, activation="identity")
    spikes = monitor.OutputMonitor(net, KLIFNode)
    potentials = monitor.AttributeMonitor("v_seq", False, net, KLIFNode)
    out = net(torch.rand(4, 3, 5) * 3)
    assert_equal(spikes["3"][0], out)
    assert potentials["1"][0].shape == (4, 3, 5)
    assert potentials["3"][0] is None  # as of LIF, which stores it on demand


@pytest.mark.skipif(not unavailable("cupy"), reason="CuPy serves here")
def test_cupy_asked_for_where_it_cannot_serve() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cupy' cannot serve here: .*backend='auto' takes the fastest"):
        KLIFNode(backend="cupy")
    with patched(LIFNode=KLIFNode) as patch:
        node = neuron.LIFNode(step_mode="m", backend="cupy")
    assert node.backend == "auto"
    assert "backend: 'cupy' -> 'auto': 'cupy' cannot serve here" in str(patch.report)


def test_checkpoints_of_other_neurons() -> None:
    """As docs/swap.md says: load into the network that the checkpoint is of, then swap; or not strictly."""
    net = nn.Sequential(
        layer.Linear(5, 5), neuron.ParametricLIFNode(init_tau=4.0), layer.Linear(5, 5), neuron.LIFNode()
    )
    checkpoint = {name: value.clone() for name, value in net.state_dict().items()}
    fresh = nn.Sequential(layer.Linear(5, 5), neuron.ParametricLIFNode(), layer.Linear(5, 5), neuron.LIFNode())
    fresh.load_state_dict(checkpoint)
    swap_neurons(fresh, KLIFNode)
    assert fresh[1].tau == pytest.approx(4.0)

    late = nn.Sequential(layer.Linear(5, 5), neuron.ParametricLIFNode(), layer.Linear(5, 5), neuron.LIFNode())
    report = swap_neurons(late, KLIFNode)
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.k", "3\.k"'):
        late.load_state_dict(checkpoint)
    missing, unexpected = late.load_state_dict(checkpoint, strict=False)
    assert (missing, unexpected) == (report.added_keys, report.removed_keys)
    assert_equal(late[2].weight, net[2].weight)
    report.undo()
    late.load_state_dict(checkpoint)
