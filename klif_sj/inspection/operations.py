"""Synaptic operations and energy of a network, by SpikingJelly 2's operation counters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _compat
from ..fuse import states_kept

__all__ = ["NO_COUNTERS", "Operations", "count_operations"]

NO_COUNTERS = "SpikingJelly 0.0.0.0.14 has no operation counters: synaptic operations and energy need spikingjelly>=2"

PICOJOULE = 1e-12


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


@torch.no_grad()
def count_operations(
    net: nn.Module,
    batches: Sequence[Any],
    inputs: int,
    forward: Callable[[nn.Module, Any], Any] = lambda net, x: net(x),
) -> Operations | None:
    """The operations of forward passes, divided by ``inputs``; None on SpikingJelly 0.0.0.0.14.

    The network is to be in evaluation mode; it is left with its states reset.

    :param forward: runs a batch through the network
    """
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
                forward(net, x)
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
