"""Every neuron class that the package exports, and what the contract suite needs to try them out.

A new neuron joins the suite by being added to ``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, runtime

STEPS, BATCH, CHANNELS = 4, 3, 5

CPU_BACKENDS = [name for name in ("torch", "cpp") if name in runtime.supported_backends()]


class LeakyIntegrator(FusedNode):
    """A user's own neuron: nothing but a charge, with two effective parameters, one for all and one by channel."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.decay = nn.Parameter(torch.tensor(0.5))
        self.gain = nn.Parameter(torch.linspace(0.8, 1.2, CHANNELS))

    def effective_parameters(self) -> dict[str, Any]:
        return {"decay": self.decay.sigmoid(), "gain": self.gain}

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * self.effective.decay + self.effective.gain * x


@dataclass(frozen=True)
class Case:
    """One neuron with one set of options, for inputs ``[STEPS, BATCH, CHANNELS]``."""

    name: str
    neuron: Callable[..., FusedNode]
    options: dict[str, Any] = field(default_factory=dict)
    smooth: bool = True
    """Whether the gradient is the equations' derivative: not so where one is cut or passed straight through."""

    def make(self, **options: Any) -> FusedNode:
        """A fresh node, multi-step unless told otherwise, always with the same initial parameters."""
        state = torch.random.get_rng_state()
        torch.manual_seed(1)
        node = self.neuron(**({"step_mode": "m"} | self.options | options))
        torch.random.set_rng_state(state)
        return node


glif = partial(GLIFNode, T=STEPS, inplane=CHANNELS)

CASES = [
    Case("user-defined", LeakyIntegrator),
    Case("klif", KLIFNode),
    Case("klif-soft-star", KLIFNode, {"v_reset": None, "scale_reset": True, "init_k": 1.3, "decay_input": False}),
    Case("klif-celu", KLIFNode, {"activation": "celu", "v_reset": -0.1, "tau": 3.0}),
    Case("klif-detach", KLIFNode, {"detach_reset": True}, smooth=False),
    Case("clif", CLIFNode),
    Case("clif-hard", CLIFNode, {"v_reset": 0.0, "decay_input": True, "tau": 3.0}),
    Case("glif", glif),
    Case("glif-layer-wise-hard-gates", glif, {"inplane": None, "gates": "hard"}, smooth=False),
    Case("glif-time-wise-gateless", glif, {"gates": "none", "time_wise": True}),
]

# Compiling takes a second a kernel: with the torch backend every case, with the others the first of every class.
CONTRACTS = [
    (case, backend)
    for number, case in enumerate(CASES)
    for backend in CPU_BACKENDS
    if backend == "torch" or case.neuron not in [earlier.neuron for earlier in CASES[:number]]
]


def current(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    """Input current at which every neuron here fires on a fair part of its steps; ``[STEPS, BATCH, CHANNELS]``."""
    x = torch.randn(shape or (STEPS, BATCH, CHANNELS), dtype=torch.float64) * 2.0 + 1.0
    return x.to(dtype).requires_grad_(requires_grad)


def states_of(node: FusedNode) -> dict[str, Tensor]:
    return {name: getattr(node, name) for name in node.states}


def snapshot(node: FusedNode) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in node._memories.items()}


def assert_memories(node: FusedNode, expected: dict[str, Any]) -> None:
    """Every memory, number or tensor, is the one of the snapshot."""
    for name, value in snapshot(node).items():
        if isinstance(value, Tensor):
            assert_equal(value, expected[name], name)
        else:
            assert value == expected[name]


def assert_same_results(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        (assert_equal if name == "spike" else assert_close)(value, second[name], name)


def weights_for(spike: Tensor) -> Tensor:
    """Different weights of the spikes in a loss, the same in every dtype."""
    return (torch.arange(spike.numel()) % 9 / 4 - 1).to(spike.dtype).view(spike.shape)


def train_step(node: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Spike, final states and every gradient of a loss on all of them."""
    x = x.detach().requires_grad_()
    node.zero_grad()
    spike = (run or node)(x)
    neurons = [module for module in node.modules() if isinstance(module, FusedNode)]
    states = {f"{i}.{name}": value for i, neuron in enumerate(neurons) for name, value in states_of(neuron).items()}
    loss = (spike * weights_for(spike)).sum() + sum((0.1 * state).sum() for state in states.values())
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in node.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in node.parameters())
    assert x.grad is not None
    return {"spike": spike.detach(), "gradient of x": x.grad, **gradients} | {k: v.detach() for k, v in states.items()}


def step_by_step(node: FusedNode, x: Tensor) -> Tensor:
    node.step_mode = "s"
    return torch.stack([node(step) for step in x.unbind(0)])
