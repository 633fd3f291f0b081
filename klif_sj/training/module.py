"""Training one network: the Lightning module, and the history that its checkpoints carry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..models import spiking_layers
from ..neuron import FusedNode
from ..parameter import PerStep

__all__ = ["History", "SpikingClassifier", "firing_rates", "neuron_parameters", "recorded_rates"]


class SpikingClassifier(lightning.LightningModule):
    """Trains a spiking network by the KLIF paper's recipe.

    The loss is the mean squared error between the firing rates of the classes and the one-hot label; Adam, its learning
    rate annealed along a cosine to zero over all epochs. Logged once an epoch: ``train_loss``, ``test_loss``,
    ``test_accuracy``, ``firing_rate/LAYER`` over the test set, ``NAME/LAYER`` for every parameter of a neuron.

    :param net: from images ``[N, C, H, W]`` to firing rates ``[N, classes]``
    :param learning_rate: Adam's, at the start
    :param epochs: the period of the cosine
    :param seed: with the epoch, it determines the dropout, so a resumed run draws what an uninterrupted one does
    """

    def __init__(self, net: nn.Module, learning_rate: float = 1e-4, epochs: int = 100, seed: int = 0) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, rates: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error against the one-hot labels."""
        return F.mse_loss(rates, F.one_hot(labels, rates.shape[1]).to(rates))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Not at the start of the epoch: whether the loader draws its own seed before or after that depends on resuming.
        if batch_index == 0:
            torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        loss = self.loss(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        functional.reset_net(self.net)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        rates, measured = firing_rates(self.net, images)
        functional.reset_net(self.net)
        metrics = {
            "test_loss": self.loss(rates, labels),
            "test_accuracy": (rates.argmax(1) == labels).float().mean(),
            **{f"firing_rate/{layer}": rate for layer, rate in measured.items()},
        }
        self.log_dict(metrics, batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(neuron_parameters(self.net))


def firing_rates(net: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A network's output, and the spikes per neuron and time step of each of its spiking layers meanwhile."""
    with recorded_rates(net) as rates:
        return net(images), rates


@contextmanager
def recorded_rates(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects, by spiking layer, the spikes per neuron and time step of its latest forward."""
    rates: dict[str, Tensor] = {}

    def record(layer: str) -> Any:
        def hook(module: nn.Module, inputs: Any, spikes: Tensor) -> None:
            rates[layer] = spikes.detach().mean(dtype=torch.float32)

        return hook

    hooks = [neuron.register_forward_hook(record(name)) for name, neuron in spiking_layers(net).items()]
    try:
        yield rates
    finally:
        for hook in hooks:
            hook.remove()


def neuron_parameters(net: nn.Module) -> dict[str, Tensor]:
    """The effective parameters of this package's neurons as ``NAME/LAYER``, averaged over channels and time."""
    return {
        f"{name}/{layer}": (value.values if isinstance(value, PerStep) else value).detach().float().mean()
        for layer, neuron in spiking_layers(net).items()
        if isinstance(neuron, FusedNode)
        for name, value in neuron.effective_parameters().items()
    }


class History(lightning.Callback):
    """What was logged in each epoch, as plain numbers; checkpoints carry it, so a resumed run has it whole."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append({"epoch": trainer.current_epoch + 1, **metrics})

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = list(state["epochs"])
