"""SpikingJelly's model zoo, built with our neurons and, separately, built with LIF and then swapped.

Every model runs forward and backward with KLIF, in single-step and in multi-step mode where it has both. With CLIF and
GLIF it is one model of each family, and the deep ones are left to KLIF, as they are the family's blocks repeated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from klif_sj import CLIFNode, GLIFNode, KLIFNode, swap_neurons
from klif_sj.swap.neuron_settings import SPIKING_NEURONS

STEPS = 2
ON_2 = pytest.mark.skipif("GatedLIFNode" not in SPIKING_NEURONS, reason="0.0.0.0.14 does not have it")


@dataclass(frozen=True)
class Model:
    """A model of the zoo, small where its constructor lets it be."""

    family: str
    name: str
    options: dict[str, Any] = field(default_factory=lambda: {"num_classes": 10})
    shape: tuple[int, ...] = (3, 32, 32)
    modes: tuple[str, ...] = ("s", "m")
    deep: bool = False
    """Whether it only repeats what a smaller one of its family has."""
    feed: str = "steps"
    """``'images'`` where the model repeats an image itself."""

    def build(self, spiking_neuron: Callable[..., nn.Module], **options: Any) -> nn.Module:
        module = importlib.import_module(f"spikingjelly.activation_based.model.{self.family}")
        return getattr(module, self.name)(spiking_neuron=spiking_neuron, **self.options, **options)

    def run(self, net: nn.Module, mode: str) -> dict[str, Tensor]:
        """One forward and backward pass; returns the gradients."""
        net.zero_grad()
        functional.set_step_mode(net, mode)
        functional.reset_net(net)
        x = torch.rand(*((STEPS, 2) if mode == "m" and self.feed == "steps" else (2,)), *self.shape) * 2
        y = net(x)
        assert torch.isfinite(y).all()
        ((y - 1) ** 2).sum().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


plif = partial(Model, "parametric_lif_net", deep=False)
transformer = {"T": STEPS, "num_classes": 10, "embed_dims": 32}

BOTH_LINES = [
    Model("spiking_vgg", "spiking_vgg11_bn"),
    Model("spiking_vgg", "spiking_vgg11", deep=True),
    Model("spiking_vgg", "spiking_vgg16_bn", deep=True),
    Model("spiking_vgg", "spiking_vgg16", deep=True),
    Model("spiking_resnet", "spiking_resnet18"),
    Model("spiking_resnet", "spiking_resnet34", deep=True),
    Model("spiking_resnet", "spiking_resnet50", deep=True),
    Model("sew_resnet", "sew_resnet18", {"num_classes": 10, "cnf": "ADD"}),
    plif("MNISTNet", {"channels": 4}, (1, 28, 28)),
    plif("FashionMNISTNet", {"channels": 4}, (1, 28, 28), deep=True),
    plif("NMNISTNet", {"channels": 4}, (2, 34, 34), deep=True),
    plif("CIFAR10Net", {"channels": 4}, deep=True),
    plif("CIFAR10DVSNet", {"channels": 4}, (2, 128, 128), deep=True),
    plif("DVSGestureNet", {"channels": 4}, (2, 128, 128), deep=True),
]
ONLY_2 = [
    Model(
        "spikformer",
        "Spikformer",
        transformer | {"num_heads": 2, "depths": 1, "patch_size": 4, "img_size_h": 32, "img_size_w": 32},
        modes=("m",),
        feed="images",
    ),
    Model(
        "qkformer",
        "QKFormer",
        transformer | {"num_heads": (2, 2, 2), "depths": (1, 1, 1)},
        modes=("m",),
        feed="images",
    ),
    Model(
        "spike_driven_transformer",
        "SpikeDrivenTransformer",
        transformer | {"num_heads": 2, "depths": 1},
        modes=("m",),
        feed="images",
    ),
    Model(
        "ms_resnet",
        "MSResNet",
        {"T": STEPS, "num_classes": 10, "layers": (1, 1, 1), "base_channels": 8},
        modes=("m",),
        feed="images",
    ),
]
CASES = [
    pytest.param(model, new, id=f"{model.name}-{new.__name__}", marks=marks)
    for models, marks in ((BOTH_LINES, []), (ONLY_2, [ON_2]))
    for model in models
    for new in (KLIFNode, CLIFNode, GLIFNode)
    if new is KLIFNode or not model.deep
]


class NarrowLinear(layer.Linear):
    """In place of the 4096 neurons of VGG's classifier, whose weights are nine tenths of the network."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(*(64 if size == 4096 else size for size in (inputs, outputs)))


def options_for(new: type) -> dict[str, Any]:
    """GLIF counts its steps: in single-step mode it is to know how many there are."""
    return {"backend": "torch"} | ({"T": STEPS} if new is GLIFNode else {})


def assert_trains(model: Model, net: nn.Module, new: type, expected: dict[str, set[str]]) -> None:
    nodes = {name: module for name, module in net.named_modules() if isinstance(module, neuron.BaseNode)}
    assert nodes
    assert {type(node) for node in nodes.values()} == {new}
    for mode in model.modes:
        gradients = model.run(net, mode)
        assert expected[mode] <= gradients.keys()
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        assert any(gradient.abs().max() > 0 for name, gradient in gradients.items() if name in expected[mode])
        own = {f"{path}.{name}" for path, node in nodes.items() for name, _ in node.named_parameters()}
        assert own <= gradients.keys()
        assert bool(own) == (new is not CLIFNode)


@pytest.mark.parametrize(("model", "new"), CASES)
def test_built_and_swapped(model: Model, new: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if model.family == "spiking_vgg":
        monkeypatch.setattr(layer, "Linear", NarrowLinear)
    lif = model.build(neuron.LIFNode, v_threshold=0.5, surrogate_function=surrogate.ATan())
    expected = {mode: set(model.run(lif, mode)) for mode in model.modes}
    functional.reset_net(lif)
    report = swap_neurons(lif, new, **options_for(new))
    assert_trains(model, lif, new, expected)
    net = model.build(partial(new, **options_for(new)), surrogate_function=surrogate.ATan())
    assert_trains(model, net, new, expected)
    assert set(report.added_keys) == {name for name, _ in net.named_parameters()} - expected[model.modes[0]]
