"""A training whose loss is no longer a number stops, and says where that began."""

from __future__ import annotations

from typing import Any, cast

import lightning
import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from .module import SpikingClassifier

__all__ = ["DivergenceError", "StopOnDivergence"]

ADVICE = "lower learning_rate, set gradient_clip, or train with precision=32-true"


class DivergenceError(RuntimeError):
    """The loss became NaN or infinite; the text says at which step, and in which layer first."""


class StopOnDivergence(lightning.Callback):
    """Stops at the first loss that is NaN or infinite, before the weights are touched.

    The batch is then run once more with the same random numbers to find the first layer that makes something not
    finite of finite inputs. Looking at the loss makes the CPU wait for the GPU once a step, as the scaler of 16-mixed
    does anyway.

    :raises DivergenceError: in every process, where the loss of any one is not finite
    """

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_index: int
    ) -> None:
        self._batch, self._batch_index = batch, batch_index
        self._generators = _generators(module.device)

    def on_before_backward(self, trainer: lightning.Trainer, module: lightning.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        finite = bool(self._loss.isfinite())
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        step = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1}, batch {self._batch_index + 1})"
        if finite:
            raise DivergenceError(f"{step}: the loss of another process is not finite; it says where that began")
        with trainer.precision_plugin.train_step_context(), torch.no_grad():
            where = self._find(cast(SpikingClassifier, module))
        raise DivergenceError(f"{step}: the loss is {self._loss.item()}. {where}. What may help: {ADVICE}")

    def _find(self, module: SpikingClassifier) -> str:
        functional.reset_net(module.net)
        broken = _first_broken_tensor(module.net)
        if broken is not None:
            return f"It began before this step: {broken} is not finite"
        _set_generators(module.device, self._generators)
        module.on_train_batch_start(self._batch, self._batch_index)
        return first_broken_layer(module, self._batch[0])


def first_broken_layer(module: SpikingClassifier, x: Tensor) -> str:
    """Which layer, in the order in which they run, is the first to make something not finite of finite inputs."""
    if not _finite(x):
        return "It began in the data: the batch holds values that are not finite"
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not found and _finite(inputs) and not _finite(output):
                kind = type(layer).__name__
                found.append(f"It began in the layer {name} ({kind}): its input is finite, its output is not")

        return look

    hooks = [
        layer.register_forward_hook(hook(name))
        for name, layer in module.net.named_modules()
        if next(layer.children(), None) is None or name.endswith("neuron")
    ]
    try:
        module(x)
    finally:
        for handle in hooks:
            handle.remove()
        functional.reset_net(module.net)
    return found[0] if found else "It began in the loss: the output of every layer is finite"


def _first_broken_tensor(net: nn.Module) -> str | None:
    for kind, tensors in (("parameter", net.named_parameters()), ("buffer", net.named_buffers())):
        for name, tensor in tensors:
            if not _finite(tensor):
                return f"the {kind} {name}"
    return None


def _finite(value: Any) -> bool:
    tensors = value if isinstance(value, tuple | list) else (value,)
    return all(bool(each.isfinite().all()) for each in tensors if isinstance(each, Tensor))


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generators(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
