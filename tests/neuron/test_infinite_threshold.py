"""v_threshold = inf: a neuron that only integrates, as SpikingJelly's LIF with such a threshold does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from neurons import CPU_BACKENDS, LeakyIntegrator, weights_for
from spikingjelly.activation_based import neuron
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, LearnableATan, swap_neurons

NEURONS: list[tuple[type[FusedNode], dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = [
    (KLIFNode, {}, lambda v, x: torch.relu(v + (x - v) / 2)),
    (KLIFNode, {"v_reset": None}, lambda v, x: torch.relu(v + (x - v) / 2)),
    (KLIFNode, {"v_reset": None, "scale_reset": True, "init_k": 2.0}, lambda v, x: torch.relu(v + (x - v) / 2)),
    (KLIFNode, {"v_reset": None, "surrogate_function": LearnableATan()}, lambda v, x: torch.relu(v + (x - v) / 2)),
    (CLIFNode, {"v_reset": 0.0}, lambda v, x: v / 2 + x),
    (CLIFNode, {}, lambda v, x: v / 2 + x),
    (LeakyIntegrator, {"v_reset": None}, lambda v, x: v / (1 + math.exp(-0.5)) + torch.linspace(0.8, 1.2, 5) * x),
]  # fmt: skip
"""A neuron, its options, and its potential after a step without a spike."""


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("number", range(len(NEURONS)))
def test_nothing_fires_and_the_potential_integrates(number: int, backend: str) -> None:
    cls, options, step = NEURONS[number]
    x = (torch.randn(4, 3, 5) * 4).requires_grad_()
    node = cls(v_threshold=math.inf, step_mode="m", backend=backend, store_v_seq=True, **options)
    spikes = node(x)
    assert_equal(spikes, torch.zeros(4, 3, 5))
    ((node.v_seq * weights_for(x)).sum() + spikes.sum()).backward()

    expected_x = x.detach().clone().requires_grad_()
    v, expected = torch.zeros(3, 5), []
    for x_t in expected_x:
        v = step(v, x_t)
        expected.append(v)
    (torch.stack(expected) * weights_for(x)).sum().backward()
    assert_close(node.v_seq, torch.stack(expected))
    assert_close(x.grad, expected_x.grad)
    for name, parameter in node.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_it_is_lif_with_such_a_threshold(backend: str) -> None:
    lif = neuron.LIFNode(v_threshold=math.inf, step_mode="m")
    net = nn.Sequential(neuron.LIFNode(v_threshold=math.inf, step_mode="m"))
    (row,) = swap_neurons(net, KLIFNode, activation="identity", backend=backend).rows
    assert row.of("kept")["v_threshold"].new == math.inf
    x = torch.randn(4, 3, 5, requires_grad=True)
    gradients = []
    for node in (lif, net[0]):
        (node(x).sum() + node.v.square().sum()).backward()
        gradients.append(x.grad)
        x.grad = None
    assert_equal(net[0].v, lif.v)
    assert_close(gradients[1], gradients[0])


def test_a_soft_reset_stays_a_number_where_lifs_does_not() -> None:
    x = torch.rand(4, 3, 5)
    lif, klif = (cls(v_threshold=math.inf, v_reset=None, step_mode="m") for cls in (neuron.LIFNode, KLIFNode))
    lif(x), klif(x)
    assert lif.v.isnan().all()
    assert klif.v.isfinite().all()


def test_other_thresholds_that_are_no_number_are_refused() -> None:
    for value in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="v_threshold: expected a finite number"):
            KLIFNode(v_threshold=value)
    with pytest.raises(TypeError, match="v_threshold: expected a number"):
        KLIFNode(v_threshold=torch.tensor(math.inf))
    with pytest.raises(ValueError, match="init_v_threshold"):
        GLIFNode(init_v_threshold=math.inf)
