"""Measure what one training step costs: time and memory, and which backend serves it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils import benchmark

from ..fuse import serving_backend
from ..models import spiking_layers
from .classifier import SpikingClassifier

__all__ = ["StepCost", "backends_serving", "measure_step", "peak_on_cpu"]


def backends_serving(net: nn.Module, images: Tensor) -> str:
    """The backends that serve the network's neurons, such as ``'cpp'``; ``'SpikingJelly'`` for its own eager code."""
    return ", ".join(
        sorted({serving_backend(neuron, images) or "SpikingJelly" for neuron in spiking_layers(net).values()})
    )


@dataclass(frozen=True)
class StepCost:
    """The cost of one training step: forward, loss and backward of one batch.

    ``seconds`` is the median wall time. ``peak_bytes`` is the largest amount of memory that the step holds at a time,
    for activations, gradients and scratch space. It leaves out the memory that was allocated before the step, for
    weights and optimiser.
    """

    seconds: float
    peak_bytes: int


def measure_step(module: SpikingClassifier, images: Tensor, labels: Tensor, min_seconds: float = 1.0) -> StepCost:
    """Measure the cost of a step on a copy of the module. Module and random generators are left as they were."""
    module = copy.deepcopy(module).to(images.device).train()

    def step() -> None:
        module.zero_grad(set_to_none=True)
        module.loss(module(images), labels).backward()
        functional.reset_net(module.net)

    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        step()  # builds kernels and fills caches
        timer = benchmark.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=min_seconds).median
        module.zero_grad(set_to_none=True)
        return StepCost(seconds, _peak_on_gpu(step, images.device) if images.is_cuda else peak_on_cpu(step))


def _peak_on_gpu(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(step: Callable[[], None]) -> int:
    """The peak memory of a step in bytes, from the allocations and releases that the profiler sees.

    The peak of the whole process is of no use here, as it never goes down again.
    """
    with profile(profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
