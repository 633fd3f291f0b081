"""Neurons, layouts, and a call of a node with everything that comes out of it, for the tests of the host's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from neurons import current, states_of, weights_for
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode
from klif_sj.neuron.parameters import PerStep

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STEPS = [1, 2, 3, 4, 8, 16, 17, 40]


class Adaptive(FusedNode):
    """A user's neuron: two states, a buffer, and learned parameters of shape [], [C], [T] and [T, C]."""

    states = ("v", "fatigue")
    time_dependent = True
    fatigue: Tensor

    def __init__(self, steps: int, channels: int, **options: Any) -> None:
        super().__init__(**options)
        self.bias = nn.Parameter(torch.tensor(0.2))
        self.leak = nn.Parameter(torch.linspace(-1.0, 1.0, channels))
        self.drive = nn.Parameter(torch.linspace(0.5, 1.0, steps))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.2, steps * channels).view(steps, channels))
        self.register_buffer("cost", torch.tensor(0.3))

    def effective_parameters(self) -> dict[str, Any]:
        return {"leak": self.leak.sigmoid(), "drive": PerStep(self.drive), "gain": PerStep(self.gain)}

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.effective.leak * self.v + self.effective.gain * x + self.effective.drive * self.bias

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.v_threshold - self.cost * self.fatigue)

    def neuronal_reset(self, spike: Tensor) -> None:
        self.fatigue = 0.8 * self.fatigue + spike
        super().neuronal_reset(spike)


def make_glif(steps: int, channels: int, **options: Any) -> GLIFNode:
    return GLIFNode(**{"T": steps, "inplane": channels} | options)


NEURONS: dict[str, tuple[Callable[..., FusedNode], list[dict[str, Any]]]] = {
    "klif": (
        lambda steps, channels, **options: KLIFNode(**options),
        [
            {},
            {"scale_reset": True},
            {"v_reset": None, "decay_input": False},
            {"v_reset": None, "scale_reset": True, "tau": 3.0},
            {"tau": 2.7, "v_reset": -0.1, "v_threshold": 0.7},
            {"detach_reset": True, "init_k": 1.3},
            {"activation": "celu", "v_reset": None},
            {"activation": "leaky_relu", "tau": 5.0, "decay_input": False},
            {"activation": "identity", "k_bounds": None, "init_k": 0.8},
            {"learn_k": False, "decay_input": False, "tau": 1.3},
        ],
    ),
    "clif": (
        lambda steps, channels, **options: CLIFNode(**options),
        [
            {},
            {"v_reset": 0.0},
            {"decay_input": True, "tau": 3.0},
            {"v_reset": -0.1, "detach_reset": True},
            {"v_threshold": 0.6, "tau": 1.5},
        ],
    ),
    "glif": (
        make_glif,
        [
            {},
            {"inplane": None},
            {"time_wise": True},
            {"gates": "hard"},
            {"gates": "none"},
            {"inplane": None, "gates": "hard", "time_wise": True, "init_v_threshold": 0.9},
            {"inplane": None, "gates": "none"},
            {"learn_gates": False, "init_tau": 0.6},
            {"learn_membrane": False, "time_wise": True},
        ],
    ),
    "user": (Adaptive, [{}, {"v_reset": None}, {"detach_reset": True}, {"v_threshold": 0.6, "v_reset": -0.2}]),
}

SHAPES = [(3, 5, 7, 11), (2, 300), (2, 3, 2, 160), (70, 6, 5)]
"""Of a time step. Blocks have 128 neurons: channels fill a part of one, two and a part, or stand side by side."""

Storage = Callable[[int, tuple[int, ...]], tuple[int, ...]]
LAYOUTS: dict[str, tuple[Storage, Callable[[Tensor, int], Tensor]]] = {
    "contiguous": (lambda steps, s: (steps, *s), lambda stored, steps: stored),
    "channels last": (lambda steps, s: (steps, s[0], *s[2:], s[1]), lambda stored, steps: stored.movedim(-1, 2)),
    "permuted": (lambda steps, s: (steps, s[1], s[0], *s[2:]), lambda stored, steps: stored.transpose(1, 2)),
    "expanded over time": (lambda steps, s: s, lambda stored, steps: stored.expand(steps, *stored.shape)),
    "every other step": (lambda steps, s: (2 * steps, *s), lambda stored, steps: stored[::2]),
    "slice of a row": (lambda steps, s: (steps, *s[:-1], s[-1] + 3), lambda stored, steps: stored[..., 1:-2]),
    "time last": (lambda steps, s: (*s, steps), lambda stored, steps: stored.movedim(-1, 0)),
}
"""The shape of what is stored, and the input cut from it. The last two have gaps within a step."""

LOSSES = [("spike",), ("states",), ("spike", "states"), ("sequences",), ("spike", "states", "sequences")]
"""Where gradients arrive from."""


@dataclass(frozen=True)
class Case:
    neuron: str
    option: int
    dtype: torch.dtype
    steps: int
    shape: tuple[int, ...]
    layout: str
    loss: tuple[str, ...] = ("spike", "states")
    given_states: bool = True

    def __str__(self) -> str:
        return f"{self.neuron}{self.option}-{self.dtype}-T{self.steps}-{self.layout}-{self.shape}".replace("torch.", "")

    @property
    def exact(self) -> bool:
        """Whether the step does nothing but arithmetic that IEEE 754 rounds in one way."""
        return self.neuron == "klif" and "celu" not in self.options.values()  # the others have exponentials

    @property
    def options(self) -> dict[str, Any]:
        return NEURONS[self.neuron][1][self.option]

    def make(self, backend: str) -> FusedNode:
        torch.manual_seed(3)
        make, _ = NEURONS[self.neuron]
        node = make(self.steps, self.shape[1], **self.options)
        node.step_mode, node.backend, node.store_v_seq = "m", backend, "sequences" in self.loss
        return node

    def stored_input(self) -> Tensor:
        storage, _ = LAYOUTS[self.layout]
        return current(*storage(self.steps, self.shape), dtype=self.dtype)

    def cut(self, stored: Tensor) -> Tensor:
        return LAYOUTS[self.layout][1](stored, self.steps)


def outcome(case: Case, backend: str, stored: Tensor, weight: Tensor, node: FusedNode | None = None) -> dict[str, Any]:
    """Everything that a call gives: spikes, states, sequences, and the gradients of whatever can have one."""
    node = node or case.make(backend)
    stored = stored.detach().clone().requires_grad_()
    x = case.cut(stored)
    given = {}
    if case.given_states:
        dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
        given = {name: (0.3 * torch.sin(torch.arange(x[0].numel()) + i)).to(dtype).view(x.shape[1:]).requires_grad_()
                 for i, name in enumerate(node.states)}  # fmt: skip
    for name, state in given.items():
        setattr(node, name, state)
    results = {"spike": {"spike": node(x)}, "states": states_of(node), "sequences": {}}
    if node.store_v_seq:
        results["sequences"] = {f"{name}_seq": getattr(node, f"{name}_seq") for name in node.states}
    outputs = [output for source in case.loss for output in results[source].values()]
    torch.autograd.backward(outputs, [(weights_for(output) + 1.25) * weight.to(output.dtype) for output in outputs])
    leaves = {"x": stored, **given, **{name: p for name, p in node.named_parameters() if p.requires_grad}}
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    forward = {name: value.detach() for group in results.values() for name, value in group.items()}
    return {"forward": forward, "gradients": gradients}


def finite_parts(actual: Tensor, expected: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Both without what is NaN or infinite in the expected one, which is to be the same in both."""
    special = ~expected.isfinite()
    torch.testing.assert_close(
        actual[special], expected[special], rtol=0.0, atol=0.0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
    return actual.masked_fill(special, 0.0), expected.masked_fill(special, 0.0)
