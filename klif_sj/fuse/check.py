"""Compare a fused neuron with its own eager code."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor

from .._compat import steps
from .._tolerance import RELATIVE
from ..codegen import StepTraceError
from .fused import fused_class, own_class

STEPS = 5


def check_fused(node: MemoryModule, shape: tuple[int, ...] | None = None, *, seed: int = 0) -> dict[str, float]:
    """Compare a neuron on kernels with its own eager code, on random input.

    Copies of the neuron run in single-step and in multi-step mode, over two sequences; the second one continues from
    the states of the first one. Spikes, final states, and the gradients of the input and of every parameter are
    compared.

    :param node: a neuron, fused or not; nothing of it is changed
    :param shape: shape of one step's input, ``[N, *]``; None takes a shape that fits the neuron's parameters
    :param seed: seed of the random input
    :return: for each quantity, the largest difference, relative to the largest value of the eager code

    :raises AssertionError: if a difference is more than rounding
    :raises ValueError: if the neuron cannot be fused
    """
    own, device = own_class(node), next((t.device for t in (*node.parameters(), *node.buffers())), torch.device("cpu"))
    differences: dict[str, float] = {}
    cls: Any = fused_class(own)
    for mode in cls._fused_source.modes:
        reference = _copy(node, cls if cls._fused_source.differs else own, mode, "torch")
        fused = _copy(node, cls, mode, "auto")
        try:
            fused._kernel_neuron_step()
        except StepTraceError as error:
            raise ValueError(str(error)) from error
        length = getattr(node, "T", STEPS) if mode == "m" else STEPS
        size = shape or fused._fused_example_shape()
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(2, length, *size, generator=generator) * 1.5 + 0.5).to(device)
        expected, actual = (_everything(twin, x, mode, seed) for twin in (reference, fused))
        for name, value in expected.items():
            differences[f"{name} ({mode})"] = _difference(actual.get(name), value)
    allowed = RELATIVE[torch.float32]
    beyond = {name: value for name, value in differences.items() if not value <= allowed}
    if beyond:
        differences_text = ", ".join(f"{name} {value:.1e}" for name, value in beyond.items())
        raise AssertionError(
            f"{own.__name__}: expected its kernels to compute what its eager code does, within {allowed:g} of the "
            f"largest value, got differences of {differences_text}"
        )
    return differences


def _copy(node: MemoryModule, cls: type, mode: str, backend: str) -> Any:
    """A copy of a neuron at its reset values, as an instance of a class, without hooks and gradients."""
    twin: Any = object.__new__(cls)
    plain = {n: v for n, v in vars(node).items() if not (isinstance(v, Tensor) and v.grad_fn is not None)}
    hooks: dict[str, Any] = {
        name: OrderedDict() for name, value in plain.items() if isinstance(value, dict) and "hooks" in name
    }
    memories = {**node._memories, **node._memories_rv}
    twin.__dict__.update(plain, **hooks, _memories=memories)
    twin.__dict__.update(_fused_backend=backend, _fused_keep_state=True, _fused_states=steps.state_names(node))
    twin = copy.deepcopy(twin)
    for attribute in ("v_seq", "state_seqs"):
        if attribute not in memories:
            twin.__dict__[attribute] = None
    twin.step_mode = mode
    twin.zero_grad()
    twin.reset()
    return twin


def _everything(node: MemoryModule, x: Tensor, mode: str, seed: int) -> dict[str, Tensor]:
    """The spikes, final states and gradients of a neuron that runs over two sequences in a row."""
    x = x.clone().requires_grad_()
    calls = x.unbind(0) if mode == "m" else x.flatten(0, 1).unbind(0)
    spikes = torch.stack([node(part) for part in calls])
    states = {name: node._memories[name] for name in steps.state_names(node)}
    outputs = {"spikes": spikes, **{name: state for name, state in states.items() if isinstance(state, Tensor)}}
    generator = torch.Generator().manual_seed(seed + 1)
    loss = torch.zeros((), device=x.device)
    for value in outputs.values():
        loss = loss + (value * torch.randn(value.shape, generator=generator).to(value.device)).sum()
    results = {name: value.detach() for name, value in outputs.items()}
    if loss.requires_grad:
        loss.backward()
        results["gradient of x"] = x.grad if x.grad is not None else torch.zeros_like(x)
        for name, parameter in node.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                results[f"gradient of {name}"] = torch.zeros_like(parameter) if grad is None else grad
    return results


def _difference(actual: Tensor | None, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    if actual is None or actual.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    same = (actual == expected) | (~finite & ~actual.isfinite())  # a potential may overflow
    if bool(same.all()):
        return 0.0
    scale = expected.abs().masked_fill(~finite, 0.0).max().item() or 1.0
    return ((actual.double() - expected.double()).abs().masked_fill(same, 0.0).max() / scale).item()
