"""Findings say what is wrong with a network: each has a figure, a threshold, a meaning, and what usually helps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .._checks import check_number

if TYPE_CHECKING:
    from .result import LayerInspection


NARROW, NOTHING = 4, 10
"""Coverage below its limit is a finding only if the surrogate is too narrow: more than ``NARROW`` times as many
potentials as it covers are within one threshold of firing. Below a ``NOTHING``-th of its limit, it always is a finding.

The condition is needed for the last layer of a trained network. Hardly any potential there is near the threshold, as
the network is sure of its classes.
"""


@dataclass(frozen=True)
class Thresholds:
    """The limits beyond which a figure is a finding; docs/inspect.md explains each.

    :raises TypeError, ValueError: for a limit that is no finite number
    """

    silent: float = 0.95
    """A layer is silent if at least this share of its neurons never fires."""
    saturated: float = 0.9
    """A layer is saturated if its firing rate is above this."""
    coverage: float = 0.05
    """Coverage is low if the surrogate has a gradient at less than this share of the potentials (see ``NARROW``)."""
    distance: float = 10.0
    """Potentials are too large if half of them are more than this many thresholds away from the threshold."""
    fall: float = 10.0
    """The gradient vanishes if the temporal gradient falls by at least this factor with every time step back."""
    at_bound: float = 0.5
    """A parameter is at a bound if at least this share of its values is."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            object.__setattr__(self, limit.name, check_number(limit.name, getattr(self, limit.name)))


@dataclass(frozen=True)
class Finding:
    """Something that usually keeps a spiking network from learning.

    :param name: the name of the finding, one of those in the table of docs/inspect.md
    :param layer: the layer's name
    :param figure: the measured figure
    :param threshold: the limit that the figure was compared with
    :param text: figure and threshold in a sentence
    :param meaning: what it means for the network
    :param help: what usually helps
    """

    name: str
    layer: str
    figure: float
    threshold: float
    text: str
    meaning: str
    help: str

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain values, for JSON."""
        return asdict(self)


CAUSES_FIRST = (
    "not-finite", "silent", "saturated", "large-potential", "coverage", "detached-time", "vanishing-gradient",
    "at-bound", "no-gradient", "constant-input",
)  # fmt: skip
"""The names of all findings, causes first. The last two findings are often consequences of others."""


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """The findings in groups by name, causes first. The findings of a group share their meaning and their help."""
    groups = {name: [finding for finding in findings if finding.name == name] for name in CAUSES_FIRST}
    return [group for group in groups.values() if group]


def find_all(layers: Iterable[LayerInspection], limits: Thresholds) -> list[Finding]:
    """The findings of all layers, causes first."""
    findings = [finding for layer in layers for finding in _find(layer, limits)]
    return [finding for group in grouped(findings) for finding in group]


def _find(layer: LayerInspection, limits: Thresholds) -> Iterator[Finding]:

    def finding(name: str, figure: float, threshold: float, text: str, meaning: str, help: str) -> Finding:
        return Finding(name, layer.name, figure, threshold, text, meaning, help)

    if not layer.integrates_only:
        if layer.never >= limits.silent:
            yield finding(
                "silent",
                layer.never,
                limits.silent,
                f"{_percent(layer.never)} of its neurons never fire ({_percent(limits.silent)} is the limit).",
                "The layers after it get nothing, and its weights hardly learn.",
                "A lower threshold, larger initial weights or normalisation before the layer; a longer T; "
                "no decay of the input (decay_input=False).",
            )
        if layer.rate > limits.saturated:
            yield finding(
                "saturated",
                layer.rate,
                limits.saturated,
                f"Its firing rate is {layer.rate:.3f} ({limits.saturated:g} is the limit).",
                "Neurons that fire at every step tell nothing of their input.",
                "A higher threshold, smaller weights, normalisation before the layer, a soft reset (v_reset=None).",
            )
    potential = layer.potential
    if potential is not None and not layer.integrates_only:
        if potential.covered < limits.coverage and (
            potential.near > NARROW * potential.covered or potential.covered < limits.coverage / NOTHING
        ):
            yield finding(
                "coverage",
                potential.covered,
                limits.coverage,
                f"The surrogate has a gradient at {_percent(potential.covered)} of the potentials "
                f"({_percent(limits.coverage)} is the limit).",
                "The gradient is practically 0 at all others, so that most spikes teach the weights nothing.",
                "A wider surrogate function (a smaller alpha); potentials nearer to the threshold, by normalisation or "
                "other initial weights.",
            )
        if potential.distance > limits.distance:
            yield finding(
                "large-potential",
                potential.distance,
                limits.distance,
                f"Half of its potentials are more than {potential.distance:.3g} thresholds away from the threshold "
                f"({limits.distance:g} is the limit).",
                "The input current is far too strong for the threshold: what fires, fires whatever the details of the "
                "input are.",
                "Smaller weights or a smaller input; normalisation before the layer; a higher threshold.",
            )
    if layer.temporal is not None and len(layer.temporal) > 1:
        if not any(layer.temporal[1:]):
            yield finding(
                "detached-time",
                0.0,
                0.0,
                "No gradient passes from a time step to the one before it.",
                "Every time step learns for itself: what an early input causes later is not learned.",
                "No detach (detach_net, detach_) between the steps of a sequence; a neuron that keeps a gradient over "
                "time (SLTT and OTTT neurons do not, by intent); tau above 1.",
            )
        elif layer.fall >= limits.fall:
            yield finding(
                "vanishing-gradient",
                layer.fall,
                limits.fall,
                f"Its temporal gradient falls by a factor of {layer.fall:.3g} with every time step back "
                f"({limits.fall:g} is the limit).",
                "What happened a few time steps ago has no share in the gradient.",
                "A larger tau; a soft reset (v_reset=None); a neuron with a second path through time (CLIFNode); "
                "a wider surrogate function.",
            )
    if layer.reached is False:
        yield finding(
            "no-gradient",
            0.0,
            0.0,
            "No gradient of the loss reaches it.",
            "Nothing before this layer learns.",
            "Look at the layers after it for silent ones and for small coverage; look for detach, torch.no_grad and "
            "argmax between it and the loss.",
        )
    for name, parameter in layer.parameters.items():
        if parameter.learned and parameter.bounds is not None and parameter.at_bound >= limits.at_bound:
            low, high = parameter.bounds
            upper = "" if math.isinf(high) else f" and {high:g}"
            yield finding(
                "at-bound",
                parameter.at_bound,
                limits.at_bound,
                f"{_percent(parameter.at_bound)} of the values of {name} are at a bound, {low:g}{upper}; their mean is "
                f"{parameter.mean:.4g} ({_percent(limits.at_bound)} is the limit).",
                "The parameter would go further and cannot; a sigmoid that is at its end hardly has a gradient.",
                "Wider bounds; a smaller learning rate for the neurons' parameters (klif_sj.parameter_groups); another "
                "initial value.",
            )
    if layer.steps > 1 and layer.after_spikes and not layer.input_changes:
        yield finding(
            "constant-input",
            0.0,
            0.0,
            "Its input is the same at every time step, though there are spiking layers before it.",
            "Time is lost before this layer: it could as well get one step.",
            "No mean or sum over time between layers; if the layers before it are silent or saturated, mend these.",
        )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
