"""The plots of an inspection, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .result import Inspection, LayerInspection

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers can tell apart and which show on white and on black."""

INK = "#010203"
"""A page replaces this colour by the colour of its text."""

SIZE = (3.5, 2.1)
"""The size of a plot in inches. On a phone a plot is as wide as the page, and its letters are as large as the text."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}

MARK = "§"
"""All names within a drawing begin with this. A page replaces it for each drawing, as drawings must not share names."""


class Chart(NamedTuple):
    """A plot: its title, and its drawing as an ``svg`` element."""

    title: str
    svg: str


Labelled = Sequence[tuple[str, LayerInspection]]
"""One layer in each inspection that has it, with the inspection's label, in the order of the inspections."""


def layer_charts(layers: Labelled) -> list[Chart]:
    """The plots of one layer, with a colour for each inspection."""
    charts = [_rates(layers), _rates_by_step(layers), _rates_by_channel(layers)]
    if any(layer.potential for _, layer in layers):
        charts.append(_potentials(layers))
    if any(layer.temporal and len(layer.temporal) > 1 for _, layer in layers):
        charts.append(_temporal(layers))
    if any(layer.gradient for _, layer in layers):
        charts.append(_gradient(layers))
    return charts


def overview_charts(inspections: Sequence[Inspection]) -> list[Chart]:
    """The plots of a whole network: a bar or line for each layer."""
    return [
        _bars(inspections, "Firing rate", "rate", lambda layer: layer.rate),
        _bars(inspections, "Neurons that never fire", "share", lambda layer: layer.never),
        _bars(
            inspections, "Surrogate coverage", "share", lambda layer: layer.potential.covered if layer.potential else 0
        ),
        _bars(inspections, "Fall of the temporal gradient", "factor a step", lambda layer: _finite(layer.fall)),
        temporal_overview(inspections),
    ]


def _finite(value: float) -> float:
    return value if np.isfinite(value) else 0.0


def temporal_overview(inspections: Sequence[Inspection], *, size: tuple[float, float] = SIZE) -> Chart:
    """The temporal gradient by lag: a line for each layer, a colour for each inspection."""

    def draw(axes: Axes) -> None:
        for inspection, colour in zip(inspections, _colours(inspections), strict=True):
            label = inspection.title
            for layer in inspection.layers.values():
                if layer.temporal and len(layer.temporal) > 1:
                    axes.plot(*_positive(layer.temporal), color=colour, label=label, linewidth=1.1)
                    label = "_"
        _temporal_axes(axes)
        if len(inspections) > 1 and axes.get_legend_handles_labels()[0]:
            axes.legend()

    return _svg("Temporal gradient by time lag, all layers", draw, size)


def _temporal_axes(axes: Axes) -> None:
    if axes.lines:
        axes.set_yscale("log")
    axes.set_xlabel("lag, time steps")
    axes.set_ylabel("mean |∂u[T] / ∂u[T−lag]|")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _positive(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The positions and the values that a logarithmic axis can show."""
    shown = [(position, value) for position, value in enumerate(values) if value > 0]
    return [position for position, _ in shown], [value for _, value in shown]


def _colours(series: Sequence[Any]) -> list[str]:
    return [COLOURS[position % len(COLOURS)] for position in range(len(series))]


def _with_colours(layers: Labelled) -> Iterable[tuple[str, LayerInspection, str]]:
    for (label, layer), colour in zip(layers, _colours(layers), strict=True):
        yield label, layer, colour


def _rates(layers: Labelled) -> Chart:
    def draw(axes: Axes) -> None:
        for _, layer, colour in _with_colours(layers):
            counts = np.array(layer.rate_histogram)
            edges = np.linspace(0, 1, len(counts) + 1)
            axes.stairs(counts / max(counts.sum(), 1), edges, color=colour, fill=len(layers) == 1, linewidth=1.4)
        axes.set_xlabel("firing rate of a neuron")
        axes.set_ylabel("share of neurons")
        axes.set_xlim(0, 1)

    return _svg("Neurons by firing rate", draw)


def _rates_by_step(layers: Labelled) -> Chart:
    def draw(axes: Axes) -> None:
        for _, layer, colour in _with_colours(layers):
            axes.plot(range(1, layer.steps + 1), layer.rate_by_step, color=colour, marker="o" * (layer.steps <= 32))
        _time_axis(axes, "firing rate")

    return _svg("Firing rate by time step", draw)


def _time_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel("time step t")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _rates_by_channel(layers: Labelled) -> Chart:
    def draw(axes: Axes) -> None:
        for _, layer, colour in _with_colours(layers):
            # The channels are sorted, because it matters whether some are silent, and hardly which ones.
            values = sorted(layer.rate_by_channel, reverse=True)
            axes.stairs(values, color=colour, fill=len(layers) == 1, linewidth=1.4)
        axes.set_xlabel("channel, by firing rate")
        axes.set_ylabel("firing rate")
        axes.set_ylim(bottom=0)

    return _svg("Firing rate by channel", draw)


def _potentials(layers: Labelled) -> Chart:
    def draw(axes: Axes) -> None:
        for _, layer, colour in _with_colours(layers):
            potential = layer.potential
            if potential is not None:
                edges = np.linspace(potential.low, potential.high, len(potential.counts) + 1)
                counts = np.array(potential.counts) / max(potential.values, 1)
                axes.stairs(counts, edges, color=colour, fill=len(layers) == 1, linewidth=1.4)
                beyond = [f"{100 * n / potential.values:.0f} %" for n in (potential.below, potential.above)]
                for place, share, side in ((0.01, f"← {beyond[0]}", "left"), (0.99, f"{beyond[1]} →", "right")):
                    if len(layers) == 1 and not share.strip("←→ ").startswith("0 "):
                        axes.text(place, 0.96, share, transform=axes.transAxes, ha=side, va="top", fontsize=8)
        axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlabel("(potential − threshold) / threshold")
        axes.set_ylabel("share of potentials")

    return _svg("Potential before firing", draw)


def _temporal(layers: Labelled) -> Chart:
    def draw(axes: Axes) -> None:
        for _, layer, colour in _with_colours(layers):
            if layer.temporal:
                axes.plot(*_positive(layer.temporal), color=colour, marker="o" * (len(layer.temporal) <= 32))
        _temporal_axes(axes)

    return _svg("Temporal gradient by time lag", draw)


def _gradient(layers: Labelled) -> Chart:
    def draw(axes: Axes) -> None:
        for _, layer, colour in _with_colours(layers):
            if layer.gradient:
                steps = range(1, len(layer.gradient) + 1)
                axes.plot(steps, layer.gradient, color=colour, marker="o" * (len(layer.gradient) <= 32))
        _time_axis(axes, "mean |∂L / ∂u[t]|")

    return _svg("Gradient of the loss by time step", draw)


def _bars(inspections: Sequence[Inspection], title: str, label: str, value: Any) -> Chart:
    names = list(dict.fromkeys(name for inspection in inspections for name in inspection.layers))
    height = 0.8 / len(inspections)

    def draw(axes: Axes) -> None:
        for number, (inspection, colour) in enumerate(zip(inspections, _colours(inspections), strict=True)):
            values = [value(inspection.layers[name]) if name in inspection.layers else 0 for name in names]
            axes.barh(np.arange(len(names)) + number * height, values, height, color=colour)
        axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, [_shortened(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel(label)

    longest = max(len(_shortened(name)) for name in names)
    rows = max(len(names), 2) * max(1, len(inspections) ** 0.5)
    return _svg(title, draw, (SIZE[0], 0.7 + 0.2 * rows), 0.25 + 0.066 * longest)


def _shortened(name: str) -> str:
    return name if len(name) <= 20 else f"…{name[-19:]}"


def _svg(title: str, draw: Any, size: tuple[float, float] = SIZE, left: float = 0.6) -> Chart:
    style: Any = {**STYLE, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size)
        axes = figure.subplots()
        draw(axes)
        if axes.get_xscale() == "linear":
            axes.locator_params(axis="x", nbins=6)
        width, height = size
        # The margins are fixed in inches, because a layout that measures the texts takes ten times as long.
        figure.subplots_adjust(left / width, 0.42 / height, 1 - 0.08 / width, 1 - 0.08 / height)
        with io.StringIO() as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            return Chart(title, _as_element(file.getvalue(), title))


def _as_element(text: str, title: str) -> str:
    """An SVG file as an element of a page, which is as wide as its place and has the page's font and text colour."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for attribute in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    text = text.replace(INK, "currentColor")
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    text = re.sub(r"(font: [^;\"']*px) [^;\"]*", r"\1 sans-serif", text)
    text = re.sub(r'\bid="', f'id="{MARK}', text)
    text = re.sub(r'href="#', f'href="#{MARK}', text).replace("url(#", f"url(#{MARK}")
    return re.sub(r"\n\s*", "\n", text).replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()
