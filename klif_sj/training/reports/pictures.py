"""The pictures of trainings with several neurons, after Figures 4, 5 and 6 of the KLIF paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...inspection.charts import COLOURS
from ..classifier import by_layer

__all__ = ["PICTURES", "draw_neurons"]

PICTURES = {
    "accuracy.png": "Test accuracy by epoch (the paper's Fig. 4)",
    "k.png": "k by layer and epoch (the paper's Fig. 5)",
    "firing_rate.png": "Firing rate by layer (the paper's Fig. 6)",
}
"""The files and their captions."""

MARKERS = "osD^v<>"
MANY_LAYERS = 6
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "savefig.dpi": 200,
    "svg.hashsalt": "klif_sj",
    # A deep network has more layers than there are colours.
    "axes.prop_cycle": cycler(linestyle=("-", "--", ":")) * cycler(color=(*COLOURS, "#000000"), marker=tuple(MARKERS)),
}


Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""For each neuron its runs, one a seed: each has ``seed`` and, by epoch, ``history``."""


def draw_neurons(runs: Runs, out: Path, *, prefix: str = "", suffix: str = ".png") -> list[str]:
    """Draw accuracy, k and firing rates into the folder ``out``; returns the files' names.

    Lines and bars are means over the seeds, bands a sample standard deviation to either side, and dots single seeds.
    There is a picture of k only if a neuron has a k.

    :param runs: the runs of each neuron
    :param prefix: the beginning of the files' names
    :param suffix: the end of the files' names, which decides the format
    """
    with matplotlib.rc_context(STYLE):
        figures = {
            f"{prefix}accuracy{suffix}": _accuracy(runs),
            f"{prefix}k{suffix}": _k(
                {name: neuron_runs for name, neuron_runs in runs.items() if by_layer(_last(neuron_runs[0]), "k")}
            ),
            f"{prefix}firing_rate{suffix}": _firing_rates(runs),
        }
        for name, figure in figures.items():
            (out / name).unlink(missing_ok=True)
            if figure is not None:
                # Without the date, and with the salt in STYLE, equal data give equal files.
                figure.savefig(out / name, metadata={"Date": None} if suffix == ".svg" else None)
    return [name for name, figure in figures.items() if figure is not None]


def _last(run: Mapping[str, Any]) -> dict[str, float]:
    """The last epoch of a run."""
    return run["history"][-1]


def _curve(axes: Axes, runs: Sequence[Mapping[str, Any]], quantity: str, label: str, factor: float = 1.0) -> None:
    """A quantity by epoch."""
    values = factor * np.array([[row[quantity] for row in run["history"]] for run in runs])
    epochs = [row["epoch"] for row in runs[0]["history"]]
    (line,) = axes.plot(epochs, values.mean(0), label=label)
    if len(epochs) > 30:
        # Markers show the points of a short run and would hide the curve of a long one.
        line.set_marker("")
    if len(runs) > 1:
        mean, deviation = values.mean(0), values.std(0, ddof=1)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _accuracy(runs: Runs) -> Figure:
    """Curves by epoch and, with several seeds, the accuracies of the last epoch, with a grey line for each seed."""
    figure, panels = _panels(2 if any(len(neuron_runs) > 1 for neuron_runs in runs.values()) else 1, sharey=False)
    for name, neuron_runs in runs.items():
        _curve(panels[0], neuron_runs, "test_accuracy", name, factor=100)
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(loc="lower right")
    for axes in panels[1:]:
        last = [
            {run["seed"]: 100 * _last(run)["test_accuracy"] for run in neuron_runs} for neuron_runs in runs.values()
        ]
        for seed in {seed for accuracies in last for seed in accuracies}:
            points = [(place, accuracies[seed]) for place, accuracies in enumerate(last) if seed in accuracies]
            axes.plot(*zip(*points, strict=True), color="0.8", linestyle="-", marker="", zorder=1)
        for place, (accuracies, line) in enumerate(zip(last, panels[0].lines, strict=True)):
            axes.scatter([place] * len(accuracies), list(accuracies.values()), color=line.get_color(), zorder=2)
        axes.set_xticks(range(len(runs)), runs, rotation=90 if len(runs) > 3 else 0)
        axes.margins(x=0.3)
        axes.set_xlabel("last epoch, a dot for each seed")
    return figure


def _k(runs: Runs) -> Figure | None:
    if not runs:
        return None
    figure, panels = _panels(len(runs))
    for axes, (name, neuron_runs) in zip(panels, runs.items(), strict=True):
        for layer in by_layer(_last(neuron_runs[0]), "k"):
            _curve(axes, neuron_runs, f"k/{layer}", layer)
        axes.set_title(name)
    panels[0].set_ylabel("k at the end of the epoch")
    columns = 1 + (len(panels[-1].lines) - 1) // (2 * MANY_LAYERS)
    panels[-1].legend(title="layer", loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns)
    return figure


def _firing_rates(runs: Runs) -> Figure:
    figure, (axes,) = _panels(1)
    layers = list(by_layer(_last(next(iter(runs.values()))[0]), "firing_rate"))
    width = 0.8 / len(runs)
    for position, (name, neuron_runs) in enumerate(runs.items()):
        places = np.arange(len(layers)) + (position - (len(runs) - 1) / 2) * width
        rates = np.array([[_last(run)[f"firing_rate/{layer}"] for layer in layers] for run in neuron_runs])
        bars = axes.bar(places, rates.mean(0), width * 0.92, label=name)
        if len(neuron_runs) > 1:
            axes.scatter(np.tile(places, len(neuron_runs)), rates, s=6, color="0.3", zorder=3)
        elif len(runs) <= 3 and len(layers) <= MANY_LAYERS:
            axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    axes.set_xticks(range(len(layers)), layers, rotation=90 if len(layers) > MANY_LAYERS else 0)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("spikes per neuron and step")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _panels(count: int, *, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.2 + 3.3 * count + (1.0 if count == 1 else 0.0), 3.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
