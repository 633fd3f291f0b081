"""Select neurons of a network, and refuse a network that cannot be changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn

from .places import Found, Survey

Selector = type | str | Callable[[str, nn.Module], bool]


def check_network(net: object, neuron_names: Collection[str], act: str) -> None:
    """Refuse an object that is no network, and a network whose neurons cannot be changed.

    :param neuron_names: names of neuron classes; no TorchScript module may contain such a neuron
    :param act: what is to be done to the network, as a verb

    :raises TypeError: for an object that is no network
    :raises ValueError: for a network on the meta device, or with a neuron within a TorchScript module
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a network, got {net!r}")
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"expected a network with its values, got one on the meta device ({name!r}); {act} after to_empty() "
                "and loading them"
            )
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "") in neuron_names:
            raise ValueError(
                f"{path}: expected a Python module, got {module.original_name} within a TorchScript module, which is "
                f"compiled as it is; {act} first, script or trace afterwards"
            )


def choose(
    net_survey: Survey, match: Selector | Iterable[Selector] | None, skip: Selector | Iterable[Selector] | None,
    is_neuron_class: Callable[[type], bool], own_class: Callable[[nn.Module], type],
    default: Collection[type] | None = None,
) -> tuple[dict[int, Found], dict[str, str]]:  # fmt: skip
    """The neurons that are meant, by id, and by path why the others are left alone.

    :param own_class: gives the class of a neuron, fused or not
    :param default: the classes that are swapped if ``match`` is None; None means every class
    """
    items = list(net_survey.neurons.values())
    matched, skipped = (_select(*option, items, is_neuron_class) for option in (("match", match), ("skip", skip)))
    chosen, left_alone = {}, dict(net_survey.unseen)
    for key, item in net_survey.neurons.items():
        cls = own_class(item.neuron)
        if key in skipped:
            why = "skip asks for it"
        elif match is not None and key not in matched:
            why = "not in match"
        elif match is None and default is not None and cls not in default:
            why = "not one of those that are swapped by default; name it in match"
        else:
            chosen[key] = item
            continue
        left_alone[item.paths[0]] = f"{cls.__name__}: {why}"
    return chosen, left_alone


def check_any(chosen: Collection[object], left_alone: Mapping[str, str], net: nn.Module, act: str) -> None:
    """Refuse a network of which no neuron is chosen; ``left_alone`` says why, by path, and ``act`` is a verb.

    :raises ValueError: if none is chosen
    """
    if not chosen:
        reasons = "; ".join(f"{path}: {why}" for path, why in left_alone.items())
        raise ValueError(f"expected neurons to {act}, got none ({reasons or _why_none(net)})")


def _why_none(net: nn.Module) -> str:
    """The likely reason why no neuron was found in a network."""
    for path, module in net.named_modules():
        if type(module).__module__ == "spikingjelly.clock_driven.neuron":
            return (
                f"{path} is a {type(module).__name__} of spikingjelly.clock_driven; build the network within "
                "'with klif_sj.patched(LIFNode=KLIFNode):', which translates that package's neurons"
            )
    return "the network has no spiking neuron"


def _select(
    option: str, selectors: Selector | Iterable[Selector] | None, items: list[Found],
    is_neuron_class: Callable[[type], bool],
) -> set[int]:  # fmt: skip
    """The ids of the neurons that match any of the selectors."""
    selected = set()
    for selector in _listed(selectors):
        if isinstance(selector, type):
            if not is_neuron_class(selector):
                raise TypeError(f"{option}: expected a class of spiking neurons, got {selector!r}")
            matching = [item for item in items if isinstance(item.neuron, selector)]
        elif isinstance(selector, str):
            matching = [item for item in items if any(fnmatch.fnmatchcase(path, selector) for path in item.paths)]
        elif callable(selector):
            matching = [item for item in items if any(selector(path, item.neuron) for path in item.paths)]
            selected |= {id(item.neuron) for item in matching}
            continue
        else:
            raise TypeError(f"{option}: expected a class, a pattern or a predicate, got {selector!r}")
        if not matching:
            present_neurons = ", ".join(f"{item.paths[0]} ({type(item.neuron).__name__})" for item in items[:8])
            raise ValueError(f"{option}: {selector!r} matches no neuron; the network has {present_neurons or 'none'}")
        selected |= {id(item.neuron) for item in matching}
    return selected


def _listed(selectors: Selector | Iterable[Selector] | None) -> list[Selector]:
    if selectors is None:
        return []
    if isinstance(selectors, type | str) or not isinstance(selectors, Iterable):
        return [selectors]
    return list(selectors)
