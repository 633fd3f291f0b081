"""Spiking neurons under activation checkpointing, which runs their forward pass a second time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from spikingjelly.activation_based.base import MemoryModule
from torch import nn

__all__ = ["state_contexts"]


def state_contexts(net: nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """The ``context_fn`` with which :func:`torch.utils.checkpoint.checkpoint` recomputes a spiking network rightly::

        y = checkpoint(net, x, use_reentrant=False, context_fn=state_contexts(net))

    Without it, the recomputation starts from the states that the forward pass left: it computes something else, and
    steps the states a second time. With it, the recomputation starts from the states with which the forward pass
    started, and leaves the present states as they are.

    :param net: the network that is checkpointed; its neurons may be ours, SpikingJelly's or any others with registered
        memories
    """
    neurons = [module for module in net.modules() if isinstance(module, MemoryModule)]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _InStates(neurons)

    return contexts


class _InStates(AbstractContextManager):
    """Gives neurons the states that they had when it was made; on exit they get their present states back."""

    def __init__(self, neurons: list[MemoryModule]) -> None:
        self._neurons = neurons
        self._states = [_states(neuron) for neuron in neurons]

    def __enter__(self) -> None:
        self._present = [_states(neuron) for neuron in self._neurons]
        _set_states(self._neurons, self._states)

    def __exit__(self, *error: object) -> None:
        _set_states(self._neurons, self._present)


def _states(neuron: MemoryModule) -> dict[str, Any]:
    """The memories of a neuron, and all else that a call may set, such as stored sequences."""
    return {**vars(neuron), "_memories": dict(neuron._memories)}


def _set_states(neurons: list[MemoryModule], states: list[dict[str, Any]]) -> None:
    for neuron, values in zip(neurons, states, strict=True):
        vars(neuron).update(values, _memories=dict(values["_memories"]))
