"""``swap_neurons`` puts other neurons into an existing network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .. import _compat
from ..fuse import own_class
from ..network.places import Found, Place, Survey, survey
from ..network.select import Selector, check_any, check_network, choose
from .hooks import carry_hooks
from .neuron_settings import KINDS, SPIKING_NEURONS, can_be_built, is_neuron_class
from .swap_report import SwapReport, SwapRow
from .translate import Entry, check_overrides, translate

DEFAULT = tuple(cls for classes in KINDS.values() for cls in classes)
NEURON_NAMES = {cls.__name__ for cls in (*DEFAULT, *SPIKING_NEURONS.values())}


def swap_neurons(
    net: nn.Module,
    neuron: type[nn.Module],
    *,
    match: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] | None = None,
    keep: bool = True,
    dry_run: bool = False,
    **overrides: Any,
) -> SwapReport:
    """Replace the spiking neurons of a network, in place, by neurons of another class.

    The new neurons get the settings of the old ones: tau (also a tau that PLIF has learned), v_threshold, v_reset,
    decay_input, detach_reset, the surrogate (the same object, or a copy for every neuron if it has parameters),
    step_mode, store_v_seq, backend, training mode, device, dtype and hooks. The report lists the settings that the new
    neuron does not have, and those that mean something else to it.

    A neuron is swapped wherever the network refers to it: in a container, an attribute, a plain list, tuple or dict. A
    shared neuron stays shared. Swap before you build the optimizer, as an older optimizer does not see the new
    parameters. States are not carried over: the new neurons start from their reset values.

    :param net: the network; it must not be a neuron itself
    :param neuron: the new class: ours, your own ``FusedNode``, or one of SpikingJelly's
    :param match: which neurons to swap: classes (with their subclasses), patterns of paths such as ``"layer1.*"``, or
        predicates ``(path, neuron) -> bool``, one or several. None means SpikingJelly's IF, LIF, ParametricLIF, KLIF,
        GatedLIF and ComplementaryLIF, and our KLIF, CLIF and GLIF, without their subclasses, as a subclass may compute
        something else.
    :param skip: which neurons not to swap, chosen in the same way
    :param keep: False gives the settings of what the new neurons compute their default values, or the overrides. The
        settings of how they run (step mode, backend, device, hooks, ...) are kept in any case.
    :param dry_run: True changes nothing and only reports
    :param overrides: arguments of the new class's constructor; ``k=1`` stands for ``init_k=1``, if there is no ``k``
    :return: the report, whose ``undo()`` puts the old neurons back

    :raises TypeError: for a class that is no neuron, or an override that the new neuron does not know
    :raises ValueError: if no neuron matches, or a pattern matches none; for a network that is a neuron itself, is on
        the meta device, or has a neuron within a TorchScript module; for a setting that the new neuron refuses

    Everything is checked before anything is changed.
    """
    if not can_be_built(neuron):
        raise TypeError(f"expected a class of spiking neurons to put into the network, got {neuron!r}")
    checked = check_overrides(neuron, overrides)
    _check_network(net)
    net_survey = survey(net, lambda module: is_neuron_class(type(module)))
    chosen, left_alone = choose(net_survey, match, skip, is_neuron_class, own_class, DEFAULT)
    check_any(chosen, left_alone, net, "swap")
    new: dict[int, nn.Module] = {}
    rows = []
    with torch.random.fork_rng(devices=[]) if dry_run else nullcontext():
        for key, item in chosen.items():
            try:
                new[key], entries = translate(item.neuron, neuron, checked, keep, like=item.reference)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{item.paths[0]} ({type(item.neuron).__name__}): {error}") from error
            rows.append(_finish(item, new[key], entries, install=not dry_run))
    report = SwapReport(tuple(rows), left_alone, dry_run)
    if not dry_run:
        report._undo = _install(net, net_survey, new)
    return report


def _check_network(net: object) -> None:
    if isinstance(net, nn.Module) and is_neuron_class(type(net)):
        raise ValueError(
            f"expected a network that holds neurons, got the neuron {type(net).__name__} itself, which cannot be "
            "replaced in place; build the new one, or put it into a torch.nn.Sequential"
        )
    check_network(net, NEURON_NAMES, "swap")


def _finish(item: Found, new: nn.Module, entries: tuple[Entry, ...], *, install: bool) -> SwapRow:
    """Give a new neuron the old one's hooks, and write its row."""
    entries += carry_hooks(item.neuron, new, install=install)
    if not item.registered:
        why = "held in no registered sub-module: the network's parameters() and state_dict() do not have its own"
        entries += (Entry("changed", "registered", False, False, why),)
    before, after = _state_keys(item.neuron), _state_keys(new)
    added, removed = (
        tuple(f"{path}.{key}" for path in item.registered for key in keys)
        for keys in ([k for k in after if k not in before], [k for k in before if k not in after])
    )
    return SwapRow(tuple(item.paths), type(item.neuron), type(new), entries, added, removed)


def _state_keys(module: nn.Module) -> list[str]:
    """The keys of a module's state dict; ``state_dict()`` itself would run hooks."""
    buffers = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, submodule in module.named_modules()
        for name in submodule._buffers
        if name not in submodule._non_persistent_buffers_set
    ]
    return [name for name, _ in module.named_parameters(remove_duplicate=False)] + buffers


def _install(net: nn.Module, net_survey: Survey, new: dict[int, nn.Module]) -> Callable[[], None]:
    """Put all new neurons into the network, or none after an error; returns a function that puts the old ones back."""
    pairs = net_survey.places_of(new)
    replaced: list[tuple[Place, Place]] = []
    try:
        for place, value in pairs:
            replaced.append((place, place.put(value)))
    except BaseException:
        for place, _ in replaced:
            place.put(place.value)
        raise
    _compat.forget_reset_lists(net)

    def undo() -> None:
        changed = [str(now.key) for _, now in replaced if not now.is_intact()]
        if changed:
            raise RuntimeError(f"expected the network as the swap left it, got others at {', '.join(changed)} since")
        for place, _ in replaced:
            place.put(place.value)
        _compat.forget_reset_lists(net)

    return undo
