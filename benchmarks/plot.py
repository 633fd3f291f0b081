"""Draw the pictures of a folder with a results.csv: ``python benchmarks/plot.py DIR``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from bench.report import LIMIT, NEURONS, any_of, compared
from bench.rows import FILE, Row, read_rows
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS = [f"C{number}" for number in range(10)]
"""Matplotlib's default colours, tab10."""

Quantity = Callable[[Row], int]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/plot.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    for path in draw_all(folder, read_rows(folder / FILE)):
        print(path)


def draw_all(folder: Path, rows: list[Row]) -> list[Path]:
    """Draw every picture for which there are rows."""
    # With a fixed salt, equal pictures give equal files.
    matplotlib.rcParams.update({"svg.hashsalt": "klif_sj", "figure.constrained_layout.use": True, "font.size": 9})
    timed = [row for row in rows if row["median_us"] or row["saved_bytes"]]
    colours = {name: COLOURS[i % 10] for i, name in enumerate(sorted({row["provider"] for row in timed} - {LIMIT}))}
    colours[LIMIT] = "black"
    drawn = []
    for device in sorted({row["device"] for row in timed}):
        of_device = [row for row in timed if row["device"] == device]
        for neuron in NEURONS:
            drawn += draw_growth(folder, device, neuron, of_device, colours)
        drawn += [
            *draw_bars(
                folder / f"overhead-{device}.svg",
                of_device,
                colours,
                "host",
                microseconds,
                "µs a call, forward + backward",
            ),
            *draw_bars(
                folder / f"memory-{device}.svg",
                of_device,
                colours,
                "memory",
                saved,
                "bytes kept for backward, of the input's",
            ),
            *draw_bars(folder / f"training-{device}.svg", of_device, colours, "step", images, "images a second"),
        ]
    return drawn


def draw_growth(folder: Path, device: str, neuron: str, rows: list[Row], colours: dict[str, str]) -> list[Path]:
    """Draw the float32 time of forward and backward against the number of neuron-steps and against T."""
    rows = [
        row
        for row in rows
        if row["suite"] in ("kernels", "cpu")
        and (row["neuron"], row["pass"], row["dtype"], row["layout"]) == (neuron, "both", "float32", "contiguous")
    ]
    measured = Counter(row["threads"] or 0 for row in rows)
    threads = max(measured, key=lambda number: (measured[number], number), default=0)
    rows = [row for row in rows if (row["threads"] or 0) == threads]
    panels: dict[str, tuple[Quantity, Quantity]] = {"neuron-steps": (steps, size), "T": (size, steps)}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=False)
    drawn = [
        draw_lines(axis, rows, colours, fixed, x, label)
        for axis, (label, (fixed, x)) in zip(axes, panels.items(), strict=True)
    ]
    path = folder / f"growth-{device}-{neuron}.svg"
    figure.suptitle(f"{NEURONS[neuron]}, forward + backward, {f'{threads} threads' if threads else 'GPU'}")
    return save(figure, path) if any(drawn) else discard(figure)


def draw_lines(axis: Axes, rows: list[Row], colours: dict[str, str], fixed: Quantity, x: Quantity, label: str) -> bool:
    """Draw a line for each provider, from the rows that have the most frequent value of the fixed quantity."""
    values: Counter[int] = Counter()
    for value, _ in {(fixed(row), x(row)) for row in rows}:
        values[value] += 1
    if not values or values.most_common(1)[0][1] < 2:
        axis.set_axis_off()
        return False
    value = values.most_common(1)[0][0]
    lines: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        if fixed(row) == value:
            lines.setdefault((row["provider"], row["launch"]), {})[x(row)] = row["median_us"]
    for (provider, launch), points in sorted(lines.items()):
        style: dict[str, Any] = {
            "marker": ".",
            "color": colours[provider],
            "linestyle": ":" if launch == "graph" else "-",
        }
        if provider == LIMIT:
            style |= {"marker": "", "linewidth": 2}
        name = provider if launch == "eager" else f"{provider}, graph replay"
        axis.loglog(*zip(*sorted(points.items()), strict=True), label=name, **style)
    axis.set(xlabel=label, ylabel="µs", title=f"T = {value}" if fixed is steps else f"{value} neuron-steps")
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return True


def draw_bars(
    path: Path, rows: Iterable[Row], colours: dict[str, str], kind: str, height: Callable[[Row], float], label: str
) -> list[Path]:
    """Draw a group of bars for each workload, with a bar for each provider."""
    groups = [
        group
        for group in compared(row for row in rows if kind in (row["launch"], row["pass"]) and row["pass"] != "forward")
        if len(group) > 1
    ]
    if not groups:
        return []
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.25 * sum(map(len, groups))))
    position, ticks = 0.0, {}
    for group in groups:
        first = position
        for provider, row in sorted(group.items()):
            axis.barh(position, height(row), color=colours[provider], label=provider)
            position += 1
        ticks[any_of(group)["workload"].replace(", contiguous", "")] = (first + position - 1) / 2
        position += 1
    axis.set_yticks([*ticks.values()], [*ticks], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), fontsize=7)
    return save(figure, path)


def steps(row: Row) -> int:
    return row["T"]


def size(row: Row) -> int:
    return row["T"] * row["neurons"]


def microseconds(row: Row) -> float:
    return row["median_us"]


def saved(row: Row) -> float:
    return row["saved_bytes"] / row["input_bytes"]


def images(row: Row) -> float:
    return row["images_per_s"]


def save(figure: pyplot.Figure, path: Path) -> list[Path]:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return [path]


def discard(figure: pyplot.Figure) -> list[Path]:
    pyplot.close(figure)
    return []


if __name__ == "__main__":
    main()
