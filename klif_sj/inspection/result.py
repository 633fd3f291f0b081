"""The results of an inspection, for each layer and for the network. They become JSON and back, and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .findings import Finding, Thresholds
from .learned import LearnedParameter
from .operations import Operations

TINY = 1e-30
"""Below this a gradient in float32 loses its digits."""

FORMAT = 1
"""The version of the format of ``inspection.json``."""


@dataclass(frozen=True)
class Potential:
    """The potentials before firing of a sample of inputs, measured from the threshold: ``u = v - v_threshold``.

    :param threshold: the unit: the threshold, or its mean if it has several values; 1 if there is none
    :param counts: histogram over u / threshold from ``low`` to ``high`` in equal bins
    :param below: potentials below the histogram
    :param above: potentials above it
    :param covered: share of potentials where the surrogate's gradient is above 1 % of its peak
    :param near: share of potentials within one threshold of the threshold
    :param distance: median of abs(u) / threshold
    :param values: how many potentials were seen
    :param inputs: how many inputs they belong to
    """

    threshold: float
    low: float
    high: float
    counts: list[int]
    below: int
    above: int
    covered: float
    near: float
    distance: float
    values: int
    inputs: int


@dataclass(frozen=True)
class LayerInspection:
    """One spiking layer.

    :param name: as in ``named_modules``, without a final ``.neuron``
    :param neuron: its class
    :param steps: T
    :param shape: the shape of a step, without the batch dimension
    :param inputs: the number of inputs that the rates are taken over
    :param rate: spikes per neuron and time step
    :param rate_by_step: the same at each time step
    :param rate_by_channel: the same for each channel, which is the first dimension of ``shape``
    :param rate_histogram: how many neurons have a rate within each of 20 equal bins from 0 to 1
    :param never: share of neurons that never fire
    :param always: share of neurons that fire at every step of every input
    :param potential: the potentials before firing; None if they could not be seen, and ``notes`` say why
    :param temporal: by time lag, the mean over the neurons that fire of abs(du[T] / du[T - lag])
    :param gradient: by time step, the mean over neurons of abs(dL / du[t]), None without a loss
    :param reached: whether the loss has any gradient with respect to its spikes, in the whole batch; None if no loss
    :param parameters: the parameters of the neuron and its surrogate function, by name
    :param input_changes: whether its input ever changes over time
    :param after_spikes: whether there are spiking layers before it
    :param integrates_only: whether its threshold is infinite, so that it is meant never to fire
    :param notes: what could not be seen, and why
    """

    name: str
    neuron: str
    steps: int
    shape: tuple[int, ...]
    inputs: int
    rate: float
    rate_by_step: list[float]
    rate_by_channel: list[float]
    rate_histogram: list[int]
    never: float
    always: float
    potential: Potential | None
    temporal: list[float] | None
    gradient: list[float] | None
    reached: bool | None
    parameters: dict[str, LearnedParameter]
    input_changes: bool
    after_spikes: bool
    integrates_only: bool
    notes: list[str] = field(default_factory=list)

    @property
    def fall(self) -> float:
        """The factor by which the temporal gradient falls with each time step back, a geometric mean over all lags.

        Lags at which the gradient is almost too small for float32 do not count.
        """
        if self.temporal is None or len(self.temporal) < 2:
            return math.nan
        lag = max(lag for lag, value in enumerate(self.temporal) if lag == 0 or value > TINY)
        return (self.temporal[0] / self.temporal[lag]) ** (1 / lag) if lag else math.inf


@dataclass(frozen=True)
class Inspection:
    """What :func:`klif_sj.inspect` found.

    :param title: what was inspected
    :param network: the network's class
    :param inputs: how many inputs were seen
    :param batches: how many batches these inputs came in
    :param layers: the spiking layers, by name, in the order in which they ran
    :param findings: what is wrong; empty for a healthy network
    :param thresholds: the limits of the findings
    :param operations: synaptic operations and energy; None if none were counted, and ``notes`` say why
    :param notes: what was sampled and how, and what could not be seen
    """

    title: str
    network: str
    inputs: int
    batches: int
    layers: dict[str, LayerInspection]
    findings: list[Finding]
    thresholds: Thresholds
    operations: Operations | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain values, for JSON. A number that is not finite becomes None."""
        return {"klif_sj_inspection": FORMAT, **_plain(asdict(self))}

    def save(self, folder: str | Path) -> Path:
        """Write ``inspection.html`` and ``inspection.json`` into a folder, which is created; returns the page's path.

        :raises ImportError: without matplotlib
        """
        return save_side_by_side([self], folder)

    def compare(self, other: Inspection) -> Comparison:
        """This inspection and another one side by side, such as those of a network before and after a swap."""
        return Comparison((self, other))

    @classmethod
    def load(cls, path: str | Path) -> Inspection:
        """The inspection in a file ``inspection.json``, or in the folder that holds it.

        :raises FileNotFoundError: if there is no such file
        :raises ValueError: for a file that does not hold exactly one inspection
        """
        path = Path(path)
        inspections = load_all(path)
        if len(inspections) != 1:
            raise ValueError(f"expected one inspection in {path}, got {len(inspections)}")
        return inspections[0]

    def __str__(self) -> str:
        return as_text([self])


@dataclass(frozen=True)
class Comparison:
    """Inspections side by side; ``print`` it for a table."""

    inspections: tuple[Inspection, ...]

    def save(self, folder: str | Path) -> Path:
        """Write one ``inspection.html`` and one ``inspection.json`` for all of them; see :meth:`Inspection.save`."""
        return save_side_by_side(self.inspections, folder)

    def __str__(self) -> str:
        return as_text(self.inspections)


def save_side_by_side(inspections: Sequence[Inspection], folder: str | Path) -> Path:
    """Write the page and the figures of some inspections into a folder; returns the page's path."""
    try:
        from .html_page import page
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the page needs {error.name}; type: pip install 'klif_sj[train]'. inspection.to_dict() needs nothing"
        ) from error
    folder = Path(folder)
    text = page(inspections)
    folder.mkdir(parents=True, exist_ok=True)
    contents = [inspection.to_dict() for inspection in inspections]
    content = contents[0] if len(contents) == 1 else {"klif_sj_inspection": FORMAT, "inspections": contents}
    (folder / "inspection.json").write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    (folder / "inspection.html").write_text(text)
    return folder / "inspection.html"


def load_all(path: Path) -> list[Inspection]:
    """The inspections in a file or folder that :meth:`Inspection.save` wrote."""
    path = path / "inspection.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no inspection {path}")
    try:
        content = json.loads(path.read_text())
        if content["klif_sj_inspection"] != FORMAT:
            raise ValueError(f"format {content['klif_sj_inspection']}, expected {FORMAT}")
        return [_from_dict(inspection) for inspection in content.get("inspections", [content])]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no inspection that klif-sj inspect wrote ({error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _from_dict(content: dict[str, Any]) -> Inspection:
    layers = {name: _layer_from_dict(layer) for name, layer in content["layers"].items()}
    findings = []
    for finding in content["findings"]:
        figures = {name: math.nan if finding[name] is None else finding[name] for name in ("figure", "threshold")}
        findings.append(Finding(**{**finding, **figures}))
    operations = content["operations"] and Operations(**content["operations"])
    return Inspection(
        **{key: content[key] for key in ("title", "network", "inputs", "batches", "notes")},
        layers=layers,
        findings=findings,
        thresholds=Thresholds(**content["thresholds"]),
        operations=operations,
    )


def _layer_from_dict(content: dict[str, Any]) -> LayerInspection:
    parameters = {}
    for name, values in content["parameters"].items():
        bounds = values["bounds"]
        if bounds is not None:
            values = {**values, "bounds": (bounds[0], math.inf if bounds[1] is None else bounds[1])}
        parameters[name] = LearnedParameter(**values)
    return LayerInspection(
        **{
            **content,
            "shape": tuple(content["shape"]),
            "potential": content["potential"] and Potential(**content["potential"]),
            "parameters": parameters,
        }
    )


def as_text(inspections: Sequence[Inspection]) -> str:
    """A table of the layers and the findings below it, in plain text."""
    from .tables import plain_text

    return plain_text(inspections)
