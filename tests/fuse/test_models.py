"""Public networks on SpikingJelly's own neurons give the same spikes and gradients before and after fuse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spiking_resnet, spiking_vgg
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import fuse

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2


class SelfAttention(nn.Module):
    """A block as Spikformer's (arXiv 2209.15425): attention of spikes without softmax, and a residual sum."""

    def __init__(self, features: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.parts = nn.ModuleDict(
            {
                name: nn.Sequential(
                    layer.Linear(features, features, bias=False), neuron.LIFNode(surrogate_function=surrogate.ATan())
                )
                for name in ("query", "key", "value", "out")
            }
        )
        self.attention = neuron.LIFNode(v_threshold=0.5, surrogate_function=surrogate.ATan())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.parts[name](x).unflatten(-1, (self.heads, -1)).transpose(2, 3) for name in ("query", "key", "value")
        )
        attended = self.attention((q @ k.transpose(-2, -1)) @ v * 0.25)
        return x + self.parts["out"](attended.transpose(2, 3).flatten(-2))


LIF = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "spiking ResNet-18": (lambda: spiking_resnet.spiking_resnet18(num_classes=10, **LIF), (2, 3, 32, 32)),
    "spiking VGG-11": (lambda: spiking_vgg.spiking_vgg11_bn(num_classes=10, **LIF), (2, 3, 32, 32)),
    "SEW-ResNet-18": (lambda: sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", **LIF), (2, 3, 32, 32)),
    "Spikformer block": (SelfAttention, (2, 8, 16)),
    "PLIF's CIFAR10-DVS net": (
        lambda: parametric_lif_net.CIFAR10DVSNet(
            channels=4, spiking_neuron=neuron.ParametricLIFNode, surrogate_function=surrogate.ATan(), detach_reset=True
        ),
        (2, 2, 128, 128),
    ),
}


def spikes_and_gradients(net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
        for module in net.modules()
        if isinstance(module, neuron.BaseNode)
    ]
    torch.manual_seed(0)  # for dropout
    output = net(x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for hook in hooks:
        hook.remove()
    return [*seen, output.detach()], [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_public_network_gives_the_same(name: str) -> None:
    make, shape = NETWORKS[name]
    net = make()
    functional.set_step_mode(net, "m")
    fused = copy.deepcopy(net)
    count = sum(isinstance(module, neuron.BaseNode) for module in net.modules())
    assert len(fuse(fused).rows) == count
    x = torch.rand(STEPS, *shape) * 2
    spikes, gradients = spikes_and_gradients(fused, x)
    expected_spikes, expected_gradients = spikes_and_gradients(net, x)
    assert any(spike.any() for spike in expected_spikes)
    for found, expected in zip(spikes, expected_spikes, strict=True):
        assert_equal(found, expected, "spikes")
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert_close(found, expected, "gradient")
