"""An inspection as tables: in plain text, and for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .findings import Finding
    from .result import Inspection, LayerInspection

COLUMNS = ("layer", "neuron", "T", "rate", "never", "always", "coverage", "fall a step", "gradient", "parameters")
WIDTH = 100


def rows(inspections: Sequence[Inspection]) -> list[tuple[str, ...]]:
    """A row for each layer; of several inspections, the rows of one layer follow each other."""
    names = dict.fromkeys(name for inspection in inspections for name in inspection.layers)
    return [
        _row(inspection.layers[name], inspection.title if len(inspections) > 1 else "")
        for name in names
        for inspection in inspections
        if name in inspection.layers
    ]


def _row(layer: LayerInspection, title: str) -> tuple[str, ...]:
    name = f"{layer.name} ({title})" if title else layer.name
    gradient = layer.gradient and sum(layer.gradient) / len(layer.gradient)
    learned = (f"{key} {each.mean:.3g}" for key, each in layer.parameters.items() if each.learned)
    return (
        name,
        layer.neuron,
        str(layer.steps),
        f"{layer.rate:.4f}",
        f"{100 * layer.never:.1f} %",
        f"{100 * layer.always:.1f} %",
        f"{100 * layer.potential.covered:.1f} %" if layer.potential else "–",
        "–" if math.isnan(layer.fall) else f"{layer.fall:.2f}",
        "–" if gradient is None else f"{gradient:.1e}",
        ", ".join(learned) or "–",
    )


def plain_text(inspections: Sequence[Inspection]) -> str:
    """Tables and findings without colours."""
    cells = [COLUMNS, *rows(inspections)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_headline(inspection) for inspection in inspections] + [""]
    lines += ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    for inspection in inspections:
        heading = f"{inspection.title}: " if len(inspections) > 1 else ""
        lines += ["", f"{heading}{_count(inspection)}"]
        for finding in inspection.findings:
            for text in _sentences(finding):
                lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
        lines += textwrap.wrap(_operations(inspection), WIDTH)
        lines += [line for note in inspection.notes for line in textwrap.wrap(note, WIDTH)]
    return "\n".join(lines)


def print_inspections(inspections: Sequence[Inspection], console: Console) -> None:
    """The same for a terminal, by rich."""
    from rich.markup import escape
    from rich.table import Table

    for inspection in inspections:
        console.print(escape(_headline(inspection)))
    table = Table(*COLUMNS[:1])
    for column in COLUMNS[1:]:
        table.add_column(column, justify="left" if column in ("neuron", "parameters") else "right")
    for row in rows(inspections):
        table.add_row(*map(escape, row))
    console.print(table)
    for inspection in inspections:
        heading = f"{inspection.title}: " if len(inspections) > 1 else ""
        console.print(escape(heading + _count(inspection)), style="bold yellow" if inspection.findings else "bold green")
        for finding in inspection.findings:
            first, *others = _sentences(finding)
            console.print(escape(first), style="yellow")
            for text in others:
                console.print(escape(text), highlight=False)
        for text in (_operations(inspection), *inspection.notes):
            if text:
                console.print(escape(text), highlight=False)


def _headline(inspection: Inspection) -> str:
    return f"{inspection.title}: {inspection.inputs} inputs in {inspection.batches} batches"


def _count(inspection: Inspection) -> str:
    number = len(inspection.findings)
    return f"{number} finding{'' if number == 1 else 's'}" if number else "No findings"


def _sentences(finding: Finding) -> tuple[str, str, str]:
    return f"{finding.layer}: {finding.name}. {finding.text}", f"  {finding.meaning}", f"  What helps: {finding.help}"


def _operations(inspection: Inspection) -> str:
    found = inspection.operations
    if found is None:
        return ""
    return (
        f"One input: {found.synaptic_operations:,.0f} synaptic operations, {found.multiply_accumulations:,.0f} "
        f"multiply-accumulations; {1e6 * (found.compute_energy + found.memory_energy):.3g} µJ by SpikingJelly's estimate "
        f"for 45 nm, of which {1e6 * found.memory_energy:.3g} µJ is memory access."
    )
