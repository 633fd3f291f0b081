"""What a training step costs: its memory, and that measuring it changes nothing."""

from __future__ import annotations

import torch
from tolerance import assert_equal
from trainings import tiny

from klif_sj.training.classifier import SpikingClassifier
from klif_sj.training.run import network_of
from klif_sj.training.step_cost import measure_step


class Allocating(SpikingClassifier):
    """In place of a training module: a step that holds a known number of bytes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        held = torch.ones(250_000)
        scratch = held * 2
        larger = scratch[:10] * held[:10]
        del held, scratch
        return self.net(images).unsqueeze(0) * larger


def test_peak_memory_is_the_most_that_a_step_holds_at_a_time() -> None:
    """Two blocks of 1 MB at a time, and a few small tensors."""
    module = Allocating(torch.nn.Linear(1, 10), tiny())
    cost = measure_step(module, torch.ones(1, 1), torch.tensor([0]), min_seconds=0)
    assert 2_000_000 <= cost.peak_bytes < 2_020_000


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(0)
    module = SpikingClassifier(network_of(tiny()), tiny())
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_numbers = torch.get_rng_state()
    measure_step(module, images, labels, min_seconds=0)
    for name, value in module.state_dict().items():
        assert_equal(value, before[name], name)
    assert_equal(torch.get_rng_state(), random_numbers, "generator state")
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.net.encoder.neuron.v == 0.0
