"""``fuse`` puts the neurons of an existing network onto generated kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor, nn

from .. import codegen, runtime
from .._checks import check_bool
from .._compat import kernel_precision, spiking_neurons, steps
from ..network.places import Found, survey
from ..network.select import Selector, check_any, check_network, choose
from ..neuron import FusedNode
from ..neuron.states import NOT_KEPT
from .check import check_fused
from .fuse_report import FuseReport, FuseRow
from .fused import SETTINGS, Fused, fused_class, own_class


class CannotFuse(ValueError):
    """A neuron cannot be fused; the text says why."""


def fuse(
    net: nn.Module,
    *,
    match: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] | None = None,
    backend: str = "auto",
    keep_state: bool = True,
    verify: bool = False,
    dry_run: bool = False,
) -> FuseReport:
    """Put the spiking neurons of a network onto kernels that are generated from their own equations, in place.

    Each neuron stays the same object. Its class becomes a generated subclass of its own class, so attributes,
    parameters, states, hooks, ``state_dict``, copies and pickles are as before. A neuron is found wherever the network
    refers to it: in a container, an attribute, a plain list, tuple or dict.

    A kernel computes the step that the neuron's class defines: charge, fire and reset as in SpikingJelly 0.0.0.0.14,
    with either version, or SpikingJelly 2's ``single_step_functional_forward``. Parameters and buffers may have any
    shape that broadcasts against a step. A neuron cannot be fused if its step has random numbers, matrix products or
    normalisation, or changes a buffer. Such a neuron is left alone, and the report says why.

    :param net: a network, or a single neuron
    :param match: which neurons to fuse: classes (with their subclasses), patterns of paths such as ``"layer1.*"``, or
        predicates ``(path, neuron) -> bool``, one or several. None means every neuron.
    :param skip: which neurons not to fuse, chosen in the same way
    :param backend: ``'auto'``, ``'cpp'``, ``'cupy'``, or ``'torch'``, which runs the neuron's own eager code
    :param keep_state: False starts every multi-step call from the reset values, and does not keep the final states
    :param verify: compare every fused neuron with its own eager code on random input (:func:`klif_sj.check_fused`)
    :param dry_run: True changes nothing and only reports
    :return: the report, whose ``undo()`` gives the neurons their own classes back

    :raises TypeError: for an object that is no network
    :raises ValueError: if no neuron matches, or no neuron that matches can be fused; for a network on the meta device,
        or with a neuron within a TorchScript module
    :raises RuntimeError: for a backend that this machine cannot run
    :raises AssertionError: with ``verify=True``, if a neuron's kernels differ from its eager code by more than rounding

    After an error the network is as it was before.
    """
    settings = dict(zip(SETTINGS, (backend, check_bool("keep_state", keep_state)), strict=False))
    check_network(net, {cls.__name__ for cls in spiking_neurons().values()}, "fuse")
    runtime.require_backend(backend)
    net_survey = survey(_Holder(net) if _is_neuron(net) else net, _is_neuron)
    chosen, left_alone = choose(net_survey, match, skip, steps.is_neuron, own_class)
    rows, changes = [], []
    for item in chosen.values():
        try:
            row, cls = _prepared(item, settings)
        except (CannotFuse, codegen.StepTraceError, steps.NoStepError) as error:
            left_alone[item.paths[0]] = f"{type(item.neuron).__name__}: {error}"
            continue
        if verify:
            row = replace(row, differences=check_fused(item.neuron))
        changes.append((item.neuron, cls, dict(settings, _fused_states=row.states)))
        rows.append(row)
    check_any(rows, left_alone, net, "fuse")
    report = FuseReport(tuple(rows), left_alone, dry_run)
    if not dry_run:
        for node, cls, added in changes:
            node.__dict__.update(added)
            node.__class__ = cls
        report._undo = functools.partial(_undo, changes)
    return report


class _Holder(nn.Module):
    """Holds a single neuron as a network does."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron


def _is_neuron(module: nn.Module) -> bool:
    return steps.is_neuron(type(module))


def _prepared(item: Found, settings: dict[str, Any]) -> tuple[FuseRow, Any]:
    """The row of a neuron that can be fused, and the class that it gets. The neuron itself is not changed.

    :raises CannotFuse, NoStepError, StepTraceError: if it cannot be fused
    """
    node: MemoryModule = item.neuron
    own: Any = type(node)
    if isinstance(node, FusedNode | Fused):
        raise CannotFuse("it runs on generated kernels already")
    if isinstance(node, torch.jit.ScriptModule):
        raise CannotFuse("it is a TorchScript module, which is compiled as it is; fuse first, script afterwards")
    if kernel_precision(node) is not None:
        raise CannotFuse("a precision is set for SpikingJelly's own kernels of it; fuse a network without one")
    try:
        cls: Any = fused_class(own)
    except TypeError as error:
        raise CannotFuse(f"no subclass of its class can be made ({error})") from error
    names = steps.state_names(node)
    if not cls._fused_starts_itself:
        for name in names:
            if not isinstance(node._memories_rv[name], int | float | Tensor):
                raise CannotFuse(
                    f"its state {name!r} starts as {node._memories_rv[name]!r}; register it with a number or a tensor"
                )
    twin: Any = object.__new__(cls)
    twin.__dict__.update(node.__dict__, **settings, _fused_states=names)
    step, _ = twin._kernel_neuron_step()
    return FuseRow(tuple(item.paths), own, names, step.program.names, cls._fused_source.note), cls


def _undo(changes: list[tuple[Any, Any, dict[str, Any]]]) -> None:
    changed = [type(node).__name__ for node, cls, _ in changes if type(node) is not cls]
    if changed:
        raise RuntimeError(f"expected the neurons as fuse left them, got others of class {', '.join(changed)} since")
    for node, cls, added in changes:
        for name, value in node._memories.items():
            if value is NOT_KEPT:
                node._memories[name] = node._memories_rv[name]
        for name in added:
            del node.__dict__[name]
        node.__class__ = cls._fused_class
