"""The pictures of trainings with several neurons, after Figures 4, 5 and 6 of the KLIF paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..classifier import by_layer

__all__ = ["PICTURES", "draw_neurons"]

PICTURES = {
    "accuracy.png": "Test accuracy by epoch (the paper's Fig. 4)",
    "k.png": "k by layer and epoch (the paper's Fig. 5)",
    "firing_rate.png": "Firing rate by layer (the paper's Fig. 6)",
}
"""The files and their captions."""

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
    # The layers of a deep network are more than there are colours.
    "axes.prop_cycle": cycler(linestyle=("-", "--", ":")) * cycler(color=COLOURS, marker=tuple(MARKERS)),
}


def draw_neurons(neurons: dict[str, Any], out: Path, *, prefix: str = "", suffix: str = ".png") -> list[str]:
    """Draw accuracy, k and firing rates into the folder ``out``; returns the files' names.

    There is none of k where no neuron has one.

    :param neurons: by name, ``history`` by epoch, and by layer the last epoch's ``k`` and ``firing_rate``
    :param prefix: how the files' names begin
    :param suffix: how they end, which decides the format
    """
    with matplotlib.rc_context(STYLE):
        figures = {
            f"{prefix}accuracy{suffix}": _accuracy(neurons),
            f"{prefix}k{suffix}": _k({name: result for name, result in neurons.items() if result["k"]}),
            f"{prefix}firing_rate{suffix}": _firing_rates(neurons),
        }
        for name, figure in figures.items():
            (out / name).unlink(missing_ok=True)
            if figure is not None:
                # Of equal data, equal files: without the date, and with the salt in STYLE.
                figure.savefig(out / name, metadata={"Date": None} if suffix == ".svg" else None)
    return [name for name, figure in figures.items() if figure is not None]


def _accuracy(neurons: dict[str, Any]) -> Figure:
    figure, (axes,) = _panels(1)
    for name, result in neurons.items():
        epochs, accuracy = zip(*((row["epoch"], 100 * row["test_accuracy"]) for row in result["history"]), strict=True)
        axes.plot(epochs, accuracy, label=name, **_markers(epochs))
    _by_epoch(axes)
    axes.set_ylabel("test accuracy (%)")
    axes.legend(loc="lower right")
    return figure


def _k(neurons: dict[str, Any]) -> Figure | None:
    if not neurons:
        return None
    figure, panels = _panels(len(neurons))
    for axes, (name, result) in zip(panels, neurons.items(), strict=True):
        history = [(row["epoch"], by_layer(row, "k")) for row in result["history"]]
        epochs = [epoch for epoch, _ in history]
        for layer in result["k"]:
            axes.plot(epochs, [values[layer] for _, values in history], label=layer, **_markers(epochs))
        _by_epoch(axes)
        axes.set_title(name)
    panels[0].set_ylabel("k at the end of the epoch")
    columns = 1 + (len(panels[-1].lines) - 1) // (2 * MANY_LAYERS)
    panels[-1].legend(title="layer", loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns)
    return figure


def _firing_rates(neurons: dict[str, Any]) -> Figure:
    figure, (axes,) = _panels(1)
    layers = list(next(iter(neurons.values()))["firing_rate"])
    width = 0.8 / len(neurons)
    for position, (name, result) in enumerate(neurons.items()):
        offset = (position - (len(neurons) - 1) / 2) * width
        rates = [result["firing_rate"][layer] for layer in layers]
        bars = axes.bar([index + offset for index in range(len(layers))], rates, width * 0.92, label=name)
        if len(neurons) <= 3 and len(layers) <= MANY_LAYERS:
            axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    axes.set_xticks(range(len(layers)), layers, rotation=90 if len(layers) > MANY_LAYERS else 0)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("spikes per neuron and step")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.2 + 3.3 * count + (1.0 if count == 1 else 0.0), 3.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _by_epoch(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _markers(epochs: Any) -> dict[str, Any]:
    """Markers show the points of a short run and would hide the curve of a long one."""
    return {} if len(epochs) <= 30 else {"marker": ""}
