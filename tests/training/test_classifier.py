"""The Lightning module: loss, optimizer and schedule, states between batches, what is logged of the neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from spikingjelly.activation_based import functional
from tolerance import assert_equal
from trainings import tiny

from klif_sj.training.classifier import SpikingClassifier, neuron_parameters, recorded_rates
from klif_sj.training.data import make_data
from klif_sj.training.recipe import load_recipe
from klif_sj.training.run import network_of


def test_loss_optimizer_and_schedule_are_the_papers() -> None:
    module = SpikingClassifier(torch.nn.Linear(2, 3), load_recipe("klif-mnist"))
    rates = torch.tensor([[0.2, 0.5, 0.1], [1.0, 0.0, 0.0]])
    by_step = torch.stack([rates + 0.3, rates - 0.3])
    squares = (0.2**2 + (0.5 - 1) ** 2 + 0.1**2) + (1.0**2 + 0.0 + (0.0 - 1) ** 2)
    assert module.loss(by_step, torch.tensor([1, 2])).item() == pytest.approx(squares / 6)
    (optimizer,), (schedule,) = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert (schedule.T_max, schedule.eta_min) == (100, 0)


def test_net_is_reset_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network_of(tiny())
    states = []
    train = SpikingClassifier.training_step

    def recorded(self: SpikingClassifier, batch: Any, index: int) -> Any:
        states.append(net.encoder.neuron.v)
        return train(self, batch, index)

    monkeypatch.setattr(SpikingClassifier, "training_step", recorded)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SpikingClassifier(net, tiny()), make_data("digits", Path(), 512, 0))
    assert states == [0.0, 0.0, 0.0]
    assert net.encoder.neuron.v == 0.0, "the evaluation resets as well"


def test_states_do_not_leak_from_one_evaluation_into_the_next() -> None:
    net = network_of(tiny()).eval()
    images = torch.rand(6, 1, 8, 8)
    with recorded_rates(net):
        first = net(images)
        functional.reset_net(net)
        again = net(images)
    assert_equal(again, first, "rates")
    assert not net.encoder.neuron._forward_hooks


def test_neuron_parameters_are_effective_ones() -> None:
    net = network_of(tiny())
    with torch.no_grad():
        net.fc1.neuron.k.fill_(9.0)
    assert {name: value.item() for name, value in neuron_parameters(net).items()} == {
        "k/encoder": 1.0,
        "k/conv1": 1.0,
        "k/fc1": 5.0,
        "k/decoder": 1.0,
    }
    glif = network_of(tiny(neuron="glif"))
    assert neuron_parameters(glif)["tau/encoder"].item() == pytest.approx(0.25)
    assert neuron_parameters(network_of(tiny(neuron="lif"))) == {}
