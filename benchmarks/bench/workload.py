"""The workload that is timed: a neuron layer on a sequence, and the least memory traffic that it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PASSES = {"forward": 2, "backward": 3, "both": 5}
"""How many tensors of the sequence's size each pass has to move at least.

Forward reads x and writes the spikes. Backward reads x and the gradient of the spikes, and writes the gradient of x.
"""

CURRENT = {
    "klif": (1.0, 0.6),
    "clif": (0.8, 0.1),
    "glif-layer": (0.8, 0.2),
    "glif-channel": (0.8, 0.2),
    "lif": (1.6, 0.4),
    "user": (0.8, 0.1),
    "fused-lif": (1.6, 0.4),
    "fused-plif": (1.6, 0.4),
    "fused-qif": (1.6, 0.4),
    "fused-eif": (1.6, 0.4),
    "fused-izhikevich": (1.6, 0.4),
}
"""By neuron, the standard deviation and the mean of the input, with which it fires in 10 to 40 % of the steps."""

ROTATED = 1 << 28
"""How many bytes the inputs of a workload take together, if a few sets suffice for it; the caches hold less."""


@dataclass(frozen=True)
class Workload:
    """A layer of ``2 ** log2_size / steps`` neurons, shaped ``[N, C, H, W]``, over a sequence of ``steps``."""

    neuron: str
    steps: int
    log2_size: int
    dtype: str = "float32"
    layout: str = "contiguous"
    device: str = "cpu"
    threads: int = 1

    @property
    def name(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.neuron}, T {self.steps}, 2**{self.log2_size} neuron-steps, {self.dtype}, {self.layout}, {where}"

    @property
    def neurons(self) -> int:
        return (1 << self.log2_size) // self.steps

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``[T, N, C, H, W]``: there are up to 64 channels of up to 32 x 32, and the batch takes the rest."""
        channels = min(64, self.neurons)
        height = min(32, 1 << math.ceil(math.log2(self.neurons // channels) / 2))
        width = min(32, self.neurons // (channels * height))
        return self.steps, self.neurons // (channels * height * width), channels, height, width

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def sequence_bytes(self) -> int:
        return (1 << self.log2_size) * self.torch_dtype.itemsize

    def floor_bytes(self, of_pass: str) -> int:
        """How many bytes a pass has to move between memory and processor at least."""
        return PASSES[of_pass] * self.sequence_bytes

    def input_sets(self) -> int:
        """How many inputs are used in turn: from two to eight, and together more than the caches hold if possible."""
        return min(max(ROTATED // self.sequence_bytes, 2), 8)

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The input current, and a dense random gradient of the spikes, uniform in [-0.5, 1.5).

        Its mean is not 0. Otherwise the gradient of a parameter, which is a sum over everything, would be mere noise.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        deviation, mean = CURRENT[self.neuron]
        x = self._empty().normal_(mean, deviation, generator=generator)
        grad = self._empty().uniform_(-0.5, 1.5, generator=generator)
        return x.requires_grad_(), grad

    def columns(self) -> dict[str, Any]:
        return {
            "workload": self.name,
            "neuron": self.neuron,
            "T": self.steps,
            "neurons": self.neurons,
            "dtype": self.dtype,
            "layout": self.layout,
            "device": self.device,
            "threads": self.threads if self.device == "cpu" else None,
        }

    def _empty(self) -> Tensor:
        steps, batch, channels, height, width = self.shape
        if self.layout == "channels_last":
            shape = (steps, batch, height, width, channels)
            return torch.empty(shape, dtype=self.torch_dtype, device=self.device).permute(0, 1, 4, 2, 3)
        return torch.empty(self.shape, dtype=self.torch_dtype, device=self.device)
