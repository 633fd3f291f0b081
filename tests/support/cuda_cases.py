"""Neurons and sizes with which every kind of CUDA kernel is executed, under emulation and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode
from klif_sj.codegen.program import Program


class ChannelLeak(FusedNode):
    """A parameter by channel and one for all, so that both kinds of sums meet in one kernel."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(**options)
        self.leak = nn.Parameter(torch.linspace(-1, 1, channels))
        self.gain = nn.Parameter(torch.tensor(1.1))

    def effective_parameters(self) -> dict[str, Any]:
        return {"leak": self.leak.sigmoid()}

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * self.effective.leak + x * self.gain


def klif(steps: int, channels: int) -> FusedNode:
    return KLIFNode(tau=3.0)


def klif_fixed(steps: int, channels: int) -> FusedNode:
    return KLIFNode(learn_k=False, v_reset=None)


def clif(steps: int, channels: int) -> FusedNode:
    return CLIFNode()


def glif(steps: int, channels: int) -> FusedNode:
    return GLIFNode(T=steps, inplane=channels)


def glif_time_wise(steps: int, channels: int) -> FusedNode:
    return GLIFNode(T=steps, inplane=channels, time_wise=True)


def glif_layer_wise(steps: int, channels: int) -> FusedNode:
    return GLIFNode(T=steps, inplane=None)


def channel_leak(steps: int, channels: int) -> FusedNode:
    return ChannelLeak(channels)


Make = Callable[[int, int], FusedNode]

# neuron, steps, shape of a step, dtype, channels_last, processors
EXECUTED: list[tuple[Make, int, tuple[int, ...], torch.dtype, bool, int]] = [
    (klif, 1, (3, 77), torch.float32, False, 4),
    (klif, 4, (2, 516), torch.float32, False, 1),
    (klif, 8, (1, 1), torch.float32, False, 1),
    (klif, 16, (2, 136), torch.float16, False, 1),
    (klif, 40, (3, 48), torch.bfloat16, False, 1),
    (klif, 3, (5, 2, 4, 4), torch.float64, True, 1),
    (klif_fixed, 4, (130,), torch.float16, False, 1),
    (clif, 2, (7, 3, 4, 4), torch.bfloat16, True, 1),
    (clif, 17, (2, 3, 8, 8), torch.float32, False, 1),
    (glif, 4, (5, 3, 8, 8), torch.float32, False, 1),
    (glif, 4, (40, 2, 8, 8), torch.float16, False, 1),
    (glif, 2, (5, 6, 5, 5), torch.float32, True, 1),
    (glif, 8, (90, 34), torch.float16, False, 1),
    (glif, 17, (70, 64), torch.float32, False, 1),
    (glif, 3, (4, 5, 3, 3), torch.float32, False, 1),
    (glif_time_wise, 17, (50, 6), torch.float32, False, 1),
    (glif_time_wise, 6, (3, 2, 8, 8), torch.float32, False, 1),
    (glif_layer_wise, 40, (3, 50), torch.float32, False, 1),
    (channel_leak, 4, (9, 3, 8, 8), torch.float32, False, 1),
    (channel_leak, 4, (9, 40), torch.float32, False, 1),
]


def program_of(node: FusedNode, dtype: torch.dtype = torch.float32) -> Program:
    """The program of a neuron that learns all that it can."""
    return node.program(dtype)


def ran(node: FusedNode, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    node.zero_grad()
    node.reset()
    spikes = node(x)
    found = {"spikes": spikes, **{name: getattr(node, name) for name in node.states}}
    loss = (spikes * grad).sum(dtype=torch.float64) + sum((found[n].double() ** 2).sum() for n in node.states)
    loss.backward()
    learned = {f"grad_{name}": p.grad for name, p in node.named_parameters() if p.requires_grad}
    return {name: value.detach().clone() for name, value in {**found, "grad_x": x.grad, **learned}.items()}
