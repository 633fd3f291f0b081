"""What a comparison found, as JSON, as Markdown and as a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from .files import write_atomically

__all__ = ["Report", "by_layer", "markdown", "rows", "terminal_table", "write"]

Report = dict[str, Any]
"""Plain values: settings, network, test_images, neurons (the results by name), command, environment, pictures."""

Row = tuple[str, list[str]]

PICTURES = {
    "accuracy.png": "Test accuracy by epoch (the paper's Fig. 4)",
    "k.png": "k by layer and epoch (the paper's Fig. 5)",
    "firing_rate.png": "Firing rate by layer (the paper's Fig. 6)",
}


def by_layer(row: dict[str, float], quantity: str) -> dict[str, float]:
    """The values of ``quantity`` in a row of a history (keys ``QUANTITY/LAYER``), by layer."""
    prefix = f"{quantity}/"
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def rows(report: Report) -> Iterator[Row]:
    """The table of results: a label and one cell for each neuron."""
    results = list(report["neurons"].values())
    yield "test accuracy, %", [f"{100 * result['test_accuracy']:.2f}" for result in results]
    for quantity, title in (("firing_rate", "firing rate"), ("k", "k")):
        for layer in dict.fromkeys(layer for result in results for layer in result[quantity]):
            yield f"{title}, {layer}", [_number(result[quantity].get(layer)) for result in results]
    yield "time a step, ms", [f"{1e3 * result['step_seconds']:.2f}" for result in results]
    yield "peak memory, MiB", [f"{result['step_peak_bytes'] / 2**20:.1f}" for result in results]
    yield "backend", [result["backend"] for result in results]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def terminal_table(report: Report) -> Table:
    """The table of results for rich."""
    settings = report["settings"]
    title = f"{settings['dataset']}, T = {settings['time_steps']}, {settings['epochs']} epochs, seed {settings['seed']}"
    table = Table(title=title, caption=report["network"])
    table.add_column()
    for name in report["neurons"]:
        table.add_column(name, justify="right")
    for label, cells in rows(report):
        table.add_row(label, *cells)
    return table


def markdown(report: Report) -> str:
    """The report as Markdown, with its pictures beside it."""
    settings, images = report["settings"], report["test_images"]
    names = list(report["neurons"])
    table = [("", names), ("---", ["---:"] * len(names)), *rows(report)]
    lines = [
        f"# {' against '.join(names)} on {settings['dataset']}",
        "",
        f"The same network, `{report['network']}`, with the same initial weights and the same order of the data for "
        f"every neuron; T = {settings['time_steps']}, {settings['epochs']} epochs, {settings['width']:g} times the "
        f"paper's width, seed {settings['seed']}.",
        "",
        *(f"| {' | '.join((label, *cells))} |" for label, cells in table),
        "",
        f"Accuracy is the last epoch's, on {images} test images that chose nothing: one image is {100 / images:.2f} "
        "points, and this is one seed. A firing rate is spikes per neuron and time step over the test set, after the "
        f"last epoch. A step is forward, loss and backward of {settings['batch_size']} images; its peak memory is what "
        "it holds beyond weights and optimiser.",
        "",
        *(f"![{title}]({name})\n" for name, title in PICTURES.items() if name in report["pictures"]),
        "## How to repeat it",
        "",
        f"    {report['command']}",
        "",
        *(f"- {label}: {text}" for label, text in report["environment"].items()),
        "",
    ]
    return "\n".join(lines)


def write(report: Report, out: Path) -> None:
    """``report.json`` and ``report.md`` in the folder ``out``."""
    write_atomically(out / "report.md", markdown(report))
    write_atomically(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
