"""What a trained network does on the test set: accuracy by time step, firing rates, operations and energy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _compat
from ..fuse import states_kept
from ..models import SpikingNetwork
from .classifier import recorded_rates

__all__ = ["NO_COUNTERS", "Evaluation", "Operations", "count_operations", "evaluate"]

NO_COUNTERS = "SpikingJelly 0.0.0.0.14 has no operation counters: synaptic operations and energy need spikingjelly>=2"

PICOJOULE = 1e-12

Batch = tuple[Tensor, Tensor]
"""Images ``[N, C, H, W]`` or frames ``[T, N, C, H, W]``, and their classes ``[N]``."""


@dataclass(frozen=True)
class Operations:
    """What a network computes for one input, but for its neurons; the mean over ``inputs`` of them.

    Counted by SpikingJelly 2's operation counters. A convolution or fully connected layer whose input is all spikes
    needs one accumulation per spike and outgoing synapse, its *synaptic operations*; any other needs a multiplication
    with each accumulation. ``accumulations`` are the synaptic operations and the additions between layers: of residual
    and parallel branches, of average pooling and voting.

    Left out are the neurons' own operations, of which a generated kernel shows nothing, and batch normalisation, which
    at inference is part of the convolution before it. Static images are convolved once, whatever T.

    ``compute_energy`` and ``memory_energy`` are SpikingJelly's estimate, in joules, for a 45 nm process and float32:
    4.6 pJ a multiply-accumulation and 0.9 pJ an accumulation; 24.96 pJ a byte of weights read, once for every
    operation that uses it, and of neuron state read and written at every time step.
    """

    inputs: int
    multiply_accumulations: float
    accumulations: float
    synaptic_operations: float
    synaptic_operations_by_layer: dict[str, float]
    compute_energy: float
    memory_energy: float


@dataclass(frozen=True)
class Evaluation:
    """``accuracy_by_step[t - 1]`` is the accuracy when the output is read after t time steps; at T it is ``accuracy``.

    ``firing_rate`` is spikes per neuron and time step, by layer. ``operations`` is None where SpikingJelly has no
    counters, or none were asked for.
    """

    inputs: int
    accuracy: float
    accuracy_by_step: list[float]
    firing_rate: dict[str, float]
    operations: Operations | None

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(net: SpikingNetwork, batches: Iterable[Batch], counted_inputs: int = 256) -> Evaluation:
    """Evaluate a network, batch by batch, on its own device.

    :param net: the network; it is left in evaluation mode, with its states reset
    :param batches: the test set
    :param counted_inputs: on how many inputs, from the first on, operations are counted, rounded up to whole batches;
        0 counts none
    :raises ValueError: where there are no batches
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
        # What ``forward`` would return after 1, 2, ..., T time steps.
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


@torch.no_grad()
def count_operations(net: nn.Module, batches: Sequence[Tensor], inputs: int) -> Operations | None:
    """The operations of forward passes in evaluation mode, divided by ``inputs``; None on SpikingJelly 0.0.0.0.14."""
    op_counter = _compat.operation_counters()
    if op_counter is None:
        return None
    left_out = {"extra_ignore_modules": [BaseNode, _BatchNorm]}
    multiplied, accumulated, synaptic = (
        counter(**left_out) for counter in (op_counter.MACCounter, op_counter.ACCounter, op_counter.SynOpCounter)
    )
    memory = op_counter.NeuromorphicMemoryAccessCounter()
    # One pass each: the counter of memory computes sums, which those of operations would count.
    for mode in (
        op_counter.DispatchCounterMode([multiplied, accumulated, synaptic]),
        op_counter.ModuleCounterMode([memory], model=net),
    ):
        # A neuron warns that it does not use its named backend while it is counted; neurons are left out here.
        for x in batches:
            functional.reset_net(net)
            with mode, states_kept(net), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                net(x)
    functional.reset_net(net)
    cost = op_counter.SimpleEnergyCostConfig.fp32()
    compute = multiplied.get_total() * cost.e_mac_pj + accumulated.get_total() * cost.e_ac_pj
    by_scope = {scope: sum(found.values()) for scope, found in synaptic.get_counts().items()}
    return Operations(
        inputs=inputs,
        multiply_accumulations=multiplied.get_total() / inputs,
        accumulations=accumulated.get_total() / inputs,
        synaptic_operations=synaptic.get_total() / inputs,
        synaptic_operations_by_layer={
            name: by_scope.get(f"{type(net).__name__}.{name}", 0) / inputs
            for name, module in net.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        },
        compute_energy=compute * PICOJOULE / inputs,
        memory_energy=memory.get_total() * cost.e_memory_pj_per_byte * PICOJOULE / inputs,
    )
