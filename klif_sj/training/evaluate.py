"""Evaluate a trained network on the test set: accuracy by time step, firing rates, operations and energy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor

from ..inspection.operations import NO_COUNTERS, Operations, count_operations
from ..models import SpikingNetwork
from .classifier import recorded_rates

__all__ = ["NO_COUNTERS", "Evaluation", "Operations", "count_operations", "evaluate"]

Batch = tuple[Tensor, Tensor]
"""Images ``[N, C, H, W]`` or frames ``[T, N, C, H, W]``, and their classes ``[N]``."""


@dataclass(frozen=True)
class Evaluation:
    """What a network does on the test set.

    ``accuracy_by_step[t - 1]`` is the accuracy if the output is read after t time steps; after T it is ``accuracy``.
    ``firing_rate`` is spikes per neuron and time step, by layer. ``operations`` is None if SpikingJelly has no
    counters, or if nothing was to be counted.
    """

    inputs: int
    accuracy: float
    accuracy_by_step: list[float]
    firing_rate: dict[str, float]
    operations: Operations | None

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(net: SpikingNetwork, batches: Iterable[Batch], counted_inputs: int = 256) -> Evaluation:
    """Evaluate a network, batch by batch, on its own device.

    :param net: the network; it is left in evaluation mode, with its states reset
    :param batches: the test set
    :param counted_inputs: the number of inputs, from the first on, on which operations are counted, rounded up to whole
        batches; 0 counts none
    :raises ValueError: if there are no batches
    """
    net.eval()
    inputs = counted = 0
    correct: list[Tensor] = []
    spikes: dict[str, Tensor] = {}
    to_count = []
    device = next(net.parameters()).device
    for batch in batches:
        x, labels = (part.to(device) for part in batch)
        functional.reset_net(net)
        with recorded_rates(net) as rates:
            outputs = net.outputs_by_step(x)
        inputs += len(labels)
        # These are the results of ``forward`` for 1, 2, ..., T time steps.
        by_step = (outputs[:step].mean(0) for step in range(1, len(outputs) + 1))
        correct.append(torch.stack([(output.argmax(1) == labels).sum() for output in by_step]))
        for layer, rate in rates.items():
            spikes[layer] = spikes.get(layer, 0) + rate.double() * len(labels)
        if counted < counted_inputs:
            counted += len(labels)
            to_count.append(x)
    functional.reset_net(net)
    if not inputs:
        raise ValueError("batches: expected at least one, got none")
    accuracies = (torch.stack(correct).sum(0).double() / inputs).tolist()
    firing_rate = {layer: float(total) / inputs for layer, total in spikes.items()}
    operations = count_operations(net, to_count, counted) if counted else None
    return Evaluation(inputs, accuracies[-1], accuracies, firing_rate, operations)
