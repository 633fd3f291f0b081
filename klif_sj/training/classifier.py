"""Train one network: the Lightning module, and the history that its checkpoints contain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..models import SpikingNetwork, spiking_layers
from ..neuron import FusedNode
from ..neuron.parameters import PerStep
from ..optim import parameter_groups
from .memory_format import channels_last_is_safe
from .recipe import Recipe

__all__ = ["LOSSES", "History", "SpikingClassifier", "by_layer", "dropout_seed", "neuron_parameters", "recorded_rates"]


def rate_mse(outputs: Tensor, labels: Tensor) -> Tensor:
    """The KLIF paper's loss: the mean squared error between firing rates, as means over time, and one-hot labels."""
    rates = outputs.mean(0)
    return F.mse_loss(rates, F.one_hot(labels, rates.shape[-1]).to(rates))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """GLIF's loss: the cross-entropy of the outputs' mean over time."""
    return F.cross_entropy(outputs.mean(0), labels)


def clif_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """CLIF's loss: 0.95 cross-entropy + 0.05 mean squared distance from 1, as the mean over the outputs of all steps.

    The second term comes from temporal efficient training, with its authors' target of 1 for every class.
    """
    each_step, repeated = outputs.flatten(0, 1), labels.repeat(len(outputs))
    return 0.95 * F.cross_entropy(each_step, repeated) + 0.05 * (each_step - 1).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rate-mse": rate_mse,
    "cross-entropy": cross_entropy,
    "clif": clif_loss,
}
"""The losses, by their names in recipes. They take outputs ``[T, N, classes]`` and labels ``[N]``."""


def dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed for each epoch and process, within the 32 bits that torch's generator on the CPU uses."""
    return (seed * 1_000_003 + epoch + rank * 0x9E3779B1) % 2**32


class SpikingClassifier(lightning.LightningModule):
    """Trains a spiking network by a recipe, which its checkpoints contain as the hyperparameter ``recipe``.

    The learning rates are annealed along a cosine to zero. Once an epoch it logs ``train_loss``, ``test_loss``,
    ``test_accuracy``, ``firing_rate/LAYER`` over the test set, and ``NAME/LAYER`` for every parameter of a neuron. If
    the recipe puts validation samples aside, they replace the test set, and ``validation`` replaces ``test`` in these
    names.
    """

    def __init__(self, net: SpikingNetwork, recipe: Recipe) -> None:
        super().__init__()
        self.save_hyperparameters({"recipe": recipe.as_dict()}, logger=False)
        self.net, self.recipe = net, recipe
        self.loss = LOSSES[recipe.loss]
        self.evaluated = "validation" if recipe.validation else "test"
        self.channels_last = recipe.channels_last and channels_last_is_safe(net)
        self._format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.to(memory_format=self._format)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs ``[T, N, classes]`` for images ``[N, C, H, W]`` or frames ``[T, N, C, H, W]``."""
        # The images of some data sets come with their channels innermost.
        images = x.flatten(0, -4).contiguous(memory_format=self._format)
        return self.net.outputs_by_step(images.unflatten(0, x.shape[:-3]))

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups = parameter_groups(self.net, recipe.learning_rate, recipe.weight_decay)
        if recipe.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, recipe.learning_rate, recipe.momentum)
        else:
            optimizer = torch.optim.Adam(groups, recipe.learning_rate)
        epochs = recipe.annealing_epochs or recipe.epochs
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)]

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # The seed depends on the recipe and the epoch alone, so a resumed run draws the same dropout as one without a
        # break. The start of the epoch would be too early: the loader draws a seed of its own before or after it,
        # depending on whether the run was resumed.
        if batch_index == 0:
            torch.manual_seed(dropout_seed(self.recipe.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, labels = batch
        loss = self.loss(self(x), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        functional.reset_net(self.net)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        x, labels = batch
        with recorded_rates(self.net) as rates:
            outputs = self(x)
        functional.reset_net(self.net)
        metrics = {
            f"{self.evaluated}_loss": self.loss(outputs, labels),
            f"{self.evaluated}_accuracy": (outputs.mean(0).argmax(1) == labels).float().mean(),
            **{f"firing_rate/{layer}": rate for layer, rate in rates.items()},
        }
        self.log_dict(metrics, batch_size=len(labels), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(neuron_parameters(self.net), sync_dist=True)


@contextmanager
def recorded_rates(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects for each spiking layer the spikes per neuron and time step in its latest forward pass."""
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
    """The metrics that were logged in each epoch. Checkpoints contain them, so a resumed run has all epochs."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append({"epoch": trainer.current_epoch + 1, **metrics})

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = list(state["epochs"])


def by_layer(row: dict[str, float], quantity: str) -> dict[str, float]:
    """The values of ``quantity`` in a row of a history (keys ``QUANTITY/LAYER``), by layer."""
    prefix = f"{quantity}/"
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
