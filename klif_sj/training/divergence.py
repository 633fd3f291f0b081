"""Stop a training whose loss or gradient is no longer finite, and say where that began."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from ..inspection.not_finite import first_not_finite, is_finite
from .classifier import SpikingClassifier

__all__ = ["DivergenceError", "StopOnDivergence"]

ADVICE = "lower learning_rate, set gradient_clip, or train with precision=32-true"


class DivergenceError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the text says at which step, and in which layer first."""


class StopOnDivergence(lightning.Callback):
    """Stops at the first loss or gradient that is NaN or infinite, before the weights are touched.

    The loss alone is not enough: a neuron whose input current is NaN does not fire, so the loss stays a number while
    the gradients make all weights NaN. With 16-mixed, gradients may overflow while the scaler searches for its scale,
    and the scaler skips these updates. So there, a gradient that is not finite counts only once the scale is below 1.

    The batch is then run once more with the same random numbers, to find the first layer whose input is finite and
    whose output is not. Reading the loss and the gradient makes the CPU wait for the GPU once a step, as the scaler
    does anyway.

    :raises DivergenceError: in every process, if the loss or the gradient of any process is not finite
    """

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_index: int
    ) -> None:
        self._batch, self._batch_index = batch, batch_index
        self._generators = _generators(module.device)

    def on_before_backward(self, trainer: lightning.Trainer, module: lightning.LightningModule, loss: Tensor) -> None:
        self._scaled_loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaler = _scaler(trainer)
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradient = _gradient_norm(module)
        loss, norm = torch.stack([self._scaled_loss.to(gradient) / scale, gradient]).tolist()
        finite = math.isfinite(loss) and (math.isfinite(norm) or (scaler is not None and scale >= 1))
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        with trainer.precision_plugin.train_step_context(), torch.no_grad():
            where = self._find(cast(SpikingClassifier, module), loss)
        raise DivergenceError(
            f"step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1}, batch {self._batch_index + 1}): the "
            f"loss is {loss:.4g}, the norm of its gradient {norm:.4g}. {where}. What may help: {ADVICE}"
        )

    def _find(self, module: SpikingClassifier, loss: float) -> str:
        functional.reset_net(module.net)
        broken = _first_broken_parameter(module.net)
        if broken is not None:
            return f"It began before this step: the parameter {broken} is not finite"
        _set_generators(module.device, self._generators)
        module.on_train_batch_start(self._batch, self._batch_index)
        finding = broken_in_forward(module, self._batch[0])
        if finding is None and not math.isfinite(loss):
            finding = "It began in the loss"
        # Gradients are means over all processes, so a process that found nothing must not blame its backward pass if
        # another process has found something.
        return _of_any_process(finding) or _broken_in_backward(module.net)


def broken_in_forward(module: SpikingClassifier, x: Tensor) -> str | None:
    """Run a batch to find the first layer, in order of execution, whose input is finite and whose output is not."""
    if not is_finite(x):
        return "It began in the data: the batch holds values that are not finite"
    try:
        broken = first_not_finite(_layers(module.net), lambda: module(x))
    finally:
        functional.reset_net(module.net)
    if broken is None:
        return None
    name, kind = broken
    return f"It began in the layer {name} ({kind}): its input is finite, its output is not"


def _layers(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a network by name, without those within a neuron, whose surrogate may run only within a kernel."""
    for name, layer in net.named_children():
        yield prefix + name, layer
        if not isinstance(layer, BaseNode):
            yield from _layers(layer, f"{prefix}{name}.")


def _of_any_process(finding: str | None) -> str | None:
    """The finding of the first process that has one, among all processes that train together."""
    if not torch.distributed.is_initialized():
        return finding
    by_process: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_process, finding)
    return next((f"In process {rank}: {text}" for rank, text in enumerate(by_process) if text is not None), None)


def _broken_in_backward(net: nn.Module) -> str:
    """A sentence that names the parameter nearest to the output whose gradient is not finite."""
    broken = [name for name, parameter in net.named_parameters() if not is_finite(parameter.grad)]
    if not broken:
        return "Every gradient is finite, but not their norm"
    return f"It began in the backward pass, at or after the parameter {broken[-1]}"


def _first_broken_parameter(net: nn.Module) -> str | None:
    return next((name for name, parameter in net.named_parameters() if not is_finite(parameter)), None)


def _gradient_norm(module: nn.Module) -> Tensor:
    norms = [
        torch.linalg.vector_norm(parameter.grad) for parameter in module.parameters() if parameter.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _scaler(trainer: lightning.Trainer) -> torch.amp.GradScaler | None:
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generators(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
