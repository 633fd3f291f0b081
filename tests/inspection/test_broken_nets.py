"""Networks that are broken on purpose: every fault is found and named, and healthy networks have no finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.neuron import LIFNode
from spikingjelly.activation_based.surrogate import ATan
from torch import Tensor, nn

import klif_sj
from klif_sj import KLIFNode
from klif_sj.models import build_network, neuron_factory
from klif_sj.training.data import make_data
from klif_sj.training.recipe import load_recipe
from klif_sj.training.run import network_of

T = 6
Batches = list[tuple[Tensor, Tensor]]


def batches(number: int = 2) -> Batches:
    """Frames [T, N, 12] and their classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(T, 24, 12, generator=generator), torch.randint(0, 4, (24,), generator=generator))
        for _ in range(number)
    ]


def network(make: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(12, 32, step_mode="m"), make(), layer.Linear(32, 24, step_mode="m"), make(),
        layer.Linear(24, 4, step_mode="m"),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(4)
        net[2].weight.mul_(6)
    return net


def lif(**options: Any) -> Callable[[], nn.Module]:
    return lambda: LIFNode(**{"surrogate_function": ATan(), "step_mode": "m", **options})


def klif(**options: Any) -> Callable[[], nn.Module]:
    return lambda: KLIFNode(step_mode="m", **options)


class DetachedLIF(LIFNode):
    """Forgets its gradient at every step, as a careless charge does."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v.detach() if isinstance(self.v, Tensor) else self.v
        self.v = self.v + (x - self.v) / self.tau


def test_healthy() -> None:
    for make in (lif(), klif()):
        assert klif_sj.inspect(network(make), batches()).findings == []


def names(inspection: klif_sj.inspection.Inspection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in inspection.findings:
        found.setdefault(finding.name, set()).add(finding.layer)
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [lif, klif])
def test_threshold_of_100(make: Any, fused: bool) -> None:
    net = network(make(v_threshold=100.0))
    if fused and make is lif:
        klif_sj.fuse(net)
    found = names(klif_sj.inspect(net, batches()))
    assert found["silent"] == {"1", "3"}
    # Nothing is wrong with time, or with the size of the current.
    assert not found.keys() & {"saturated", "large-potential", "detached-time", "at-bound", "not-finite"}


@pytest.mark.parametrize("fused", [False, True])
def test_weights_times_50(fused: bool) -> None:
    net = network(lif())
    with torch.no_grad():
        net[0].weight.mul_(50)
    if fused:
        klif_sj.fuse(net)
    found = names(klif_sj.inspect(net, batches()))
    assert found["large-potential"] == {"1"}
    assert "silent" not in found


@pytest.mark.parametrize("make", [lif, klif])
def test_surrogate_alpha_of_100(make: Any) -> None:
    net = network(make(surrogate_function=ATan(alpha=100.0)))
    found = names(klif_sj.inspect(net, batches()))
    assert found == {"coverage": {"1", "3"}}


@pytest.mark.parametrize("k", [0.5, 5.0, 7.0])
def test_k_at_its_bound(k: float) -> None:
    net = network(klif())
    with torch.no_grad():
        net[1].k.fill_(k)
    (finding,) = [each for each in klif_sj.inspect(net, batches()).findings if each.name == "at-bound"]
    assert finding.layer == "1"
    assert finding.figure == 1.0
    assert f"their mean is {min(k, 5.0):g}" in finding.text
    with torch.no_grad():
        net[1].k.fill_(4.9)
    assert "at-bound" not in names(klif_sj.inspect(net, batches()))
    with torch.no_grad():
        net[1].k.fill_(5.0)
    net[1].k.requires_grad_(False)
    assert "at-bound" not in names(klif_sj.inspect(net, batches()))


def test_time_that_a_neuron_detaches() -> None:
    net = network(lambda: DetachedLIF(surrogate_function=ATan(), step_mode="m"))
    klif_sj.fuse(net, backend="torch")  # SpikingJelly 2 itself does not run this charge
    found = names(klif_sj.inspect(net, batches()))
    assert found == {"detached-time": {"1", "3"}}


@pytest.mark.parametrize("make", [lif, klif])
def test_time_that_the_loop_detaches(make: Any) -> None:
    net = network(make())
    functional.set_step_mode(net, "s")

    def forward(net: nn.Module, x: Tensor, detach: bool) -> Tensor:
        outputs = []
        for step in x:
            outputs.append(net(step))
            if detach:
                functional.detach_net(net)
        return torch.stack(outputs)

    def inspected(detach: bool) -> dict[str, set[str]]:
        return names(klif_sj.inspect(net, batches(), forward=lambda net, x: forward(net, x, detach)))

    assert inspected(False) == {}
    assert inspected(True) == {"detached-time": {"1", "3"}}


@pytest.mark.parametrize("neuron", ["lif", "klif", "clif", "glif"])
def test_a_network_of_the_recipes_as_it_is_trained(neuron: str, tmp_path: Any) -> None:
    recipe = load_recipe("digits").override(neuron=neuron, batch_size=64)
    data = make_data("digits", tmp_path, 64, 0, time_steps=recipe.time_steps)
    net = network_of(recipe)
    batches = [batch for _, batch in zip(range(2), data.train_dataloader(), strict=False)]
    assert klif_sj.inspect(net.train(), batches).findings == []


def test_names_of_the_recipes_layers() -> None:
    factory = neuron_factory("klif", 2)
    net = build_network("klif-mnist", factory, 2, in_channels=1, image_size=8, classes=10, width=1 / 32)
    found = klif_sj.inspect(net, [torch.rand(4, 1, 8, 8)])
    assert list(found.layers) == ["encoder", "conv1", "fc1", "decoder"]
