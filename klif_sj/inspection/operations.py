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
    """The operations of a network for one input, without those of its neurons: means over ``inputs`` inputs.

    SpikingJelly 2's operation counters count them. A convolution or fully connected layer whose input is all spikes
    needs one accumulation per spike and outgoing synapse; these are its *synaptic operations*. Any other layer needs a
    multiplication with each accumulation. ``accumulations`` are the synaptic operations and the additions between
    layers: those of residual and parallel branches, of average pooling and of voting.

    The neurons' own operations are left out, because a generated kernel does not show them. Batch normalisation is left
    out, because it is part of the convolution before it at inference. Static images are convolved once, whatever T is.

    ``compute_energy`` and ``memory_energy`` are SpikingJelly's estimates, in joules, for a 45 nm process and float32:
    4.6 pJ for a multiply-accumulation, 0.9 pJ for an accumulation, and 24.96 pJ for each byte of memory access. Weights
    are read once for every operation that uses them; neuron states are read and written at every time step.
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

    The network must be in evaluation mode. Its states are reset afterwards.

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
    # Each mode gets a pass of its own, because the operation counters would count the sums of the memory counter.
    for mode in (
        op_counter.DispatchCounterMode([multiplied, accumulated, synaptic]),
        op_counter.ModuleCounterMode([memory], model=net),
    ):
        # While it is counted, a neuron warns that it does not use the backend it was given. That does not matter here,
        # because neurons are left out.
        for x in batches:
            functional.reset_net(net)
            with mode, states_kept(net), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                forward(net, x)
    functional.reset_net(net)
    cost = op_counter.SimpleEnergyCostConfig.fp32()
    compute = multiplied.get_total() * cost.e_mac_pj + accumulated.get_total() * cost.e_ac_pj
    by_scope = {scope: sum(counts.values()) for scope, counts in synaptic.get_counts().items()}
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
