"""An inspection as tables: in plain text, and for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .findings import Finding, grouped

if TYPE_CHECKING:
    from rich.console import Console

    from .learned import LearnedParameter
    from .result import Inspection, LayerInspection

COLUMNS = ("layer", "of", "neuron", "T", "rate", "never %", "always %", "cover %", "fall", "gradient")
PARAMETERS = ("layer", "of", "parameter", "mean", "least", "most", "bounds")
TEXTS = {"layer", "of", "neuron", "parameter", "bounds"}
"""The columns that hold text and no numbers."""

WIDTH = 100

Rows = list[tuple[str, ...]]


def layer_table(inspections: Sequence[Inspection]) -> Rows:
    """A head, and a row for each layer. With several inspections, the rows of one layer follow each other."""
    return _without_of([COLUMNS, *(_layer(title, layer) for title, layer in _layers(inspections))], inspections)


def parameter_table(inspections: Sequence[Inspection]) -> Rows:
    """A head, and a row for each parameter that is learned; nothing if no parameter is."""
    rows = [
        (
            layer.name,
            title,
            name,
            *(f"{value:.4g}" for value in (parameter.mean, parameter.low, parameter.high)),
            bounds_of(parameter),
        )
        for title, layer in _layers(inspections)
        for name, parameter in layer.parameters.items()
        if parameter.learned
    ]
    return _without_of([PARAMETERS, *rows], inspections) if rows else []


def _layers(inspections: Sequence[Inspection]) -> Iterator[tuple[str, LayerInspection]]:
    for name in dict.fromkeys(name for inspection in inspections for name in inspection.layers):
        for inspection in inspections:
            if name in inspection.layers:
                yield inspection.title, inspection.layers[name]


def _without_of(table: Rows, inspections: Sequence[Inspection]) -> Rows:
    """The table without the column of titles, if there is only one inspection."""
    return table if len(inspections) > 1 else [(row[0], *row[2:]) for row in table]


def bounds_of(parameter: LearnedParameter) -> str:
    """The bounds of a parameter in words."""
    if parameter.bounds is None:
        return "–"
    low, high = parameter.bounds
    return f"{low:g} to {high:g}" if math.isfinite(high) else f"from {low:g}"


def _layer(title: str, layer: LayerInspection) -> tuple[str, ...]:
    gradient = layer.gradient and sum(layer.gradient) / len(layer.gradient)
    return (
        layer.name,
        title,
        layer.neuron,
        str(layer.steps),
        f"{layer.rate:.4f}",
        f"{100 * layer.never:.1f}",
        f"{100 * layer.always:.1f}",
        f"{100 * layer.potential.covered:.1f}" if layer.potential else "–",
        "–" if math.isnan(layer.fall) else f"{layer.fall:.2f}",
        "–" if gradient is None else f"{gradient:.1e}",
    )


def plain_text(inspections: Sequence[Inspection]) -> str:
    """Tables and findings without colours."""
    lines = [_headline(inspection) for inspection in inspections]
    for table in (layer_table(inspections), parameter_table(inspections)):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [""] + ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    for inspection in inspections:
        heading = f"{inspection.title}: " if len(inspections) > 1 else ""
        lines += ["", f"{heading}{_count(inspection)}"]
        for group in grouped(inspection.findings):
            for text in _sentences(group):
                lines += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
        lines += textwrap.wrap(operations_text(inspection), WIDTH)
        lines += [line for note in inspection.notes for line in textwrap.wrap(note, WIDTH)]
    return "\n".join(lines)


def print_inspections(inspections: Sequence[Inspection], console: Console) -> None:
    """Print tables and findings in colour to a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    for inspection in inspections:
        console.print(escape(_headline(inspection)))
    for cells in filter(None, (layer_table(inspections), parameter_table(inspections))):
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0))
        for column in cells[0]:
            is_text = column in TEXTS
            table.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
        for row in cells[1:]:
            table.add_row(*map(escape, row))
        console.print(table)
    for inspection in inspections:
        heading = f"{inspection.title}: " if len(inspections) > 1 else ""
        style = "bold yellow" if inspection.findings else "bold green"
        console.print(escape(heading + _count(inspection)), style=style)
        for group in grouped(inspection.findings):
            first, *others = _sentences(group)
            console.print(escape(first), style="yellow")
            for text in others:
                console.print(escape(text), highlight=False)
        for text in filter(None, (operations_text(inspection), *inspection.notes)):
            console.print(escape(text), highlight=False)


def _headline(inspection: Inspection) -> str:
    batches = counted(inspection.batches, "batch", "batches")
    return f"{inspection.title}: {counted(inspection.inputs, 'input')} in {batches}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things: ``1 input``, ``2 inputs``, ``no inputs``."""
    return f"{number or 'no'} {noun if number == 1 else plural or noun + 's'}"


def _count(inspection: Inspection) -> str:
    return counted(len(inspection.findings), "finding").capitalize()


def _sentences(group: Sequence[Finding]) -> list[str]:
    """The findings of one name as lines of text."""
    layers = (f"  {finding.layer}: {finding.text}" for finding in group)
    return [group[0].name, *layers, f"  {group[0].meaning}", f"  What usually helps: {group[0].help}"]


def operations_text(inspection: Inspection) -> str:
    """What one input costs, in a sentence."""
    operations = inspection.operations
    if operations is None:
        return ""
    return (
        f"One input: {operations.synaptic_operations:,.0f} synaptic operations, "
        f"{operations.multiply_accumulations:,.0f} multiply-accumulations; "
        f"{1e6 * (operations.compute_energy + operations.memory_energy):.3g} µJ by SpikingJelly's estimate for 45 nm, "
        f"of which {1e6 * operations.memory_energy:.3g} µJ is memory access."
    )
