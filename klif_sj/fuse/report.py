"""What a call of fuse did to a network, as a table, as a dict, and to be undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..network.table import aligned, group_lines

HALF = "16-bit input: states and arithmetic are float32, where SpikingJelly's own are 16-bit"


@dataclass(frozen=True)
class FuseRow:
    """One neuron that was fused."""

    paths: tuple[str, ...]
    """Where it is: more than one path where it is shared."""
    neuron: type
    """Its own class."""
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    """The neuron's own tensors that its step reads."""
    note: str = ""
    """How it now differs from what SpikingJelly runs."""
    differences: Mapping[str, float] | None = None
    """With ``verify=True``: by name, the largest difference from the neuron's own eager code, relative to the largest
    value."""

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {
            "paths": list(self.paths),
            "neuron": f"{self.neuron.__module__}.{self.neuron.__qualname__}",
            "states": list(self.states),
            "parameters": list(self.parameters),
            "note": self.note,
            "differences": None if self.differences is None else dict(self.differences),
        }


@dataclass
class FuseReport:
    """What :func:`klif_sj.fuse` did to a network; ``print`` it for a table."""

    rows: tuple[FuseRow, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    """Neurons that were not fused, by path, and why."""
    dry_run: bool = False
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Give every neuron its own class back, with the states that it has now.

        :raises RuntimeError: if there is nothing to undo, or if a neuron has been changed otherwise since; nothing is
            changed then
        """
        if self._undo is None:
            raise RuntimeError("expected a fuse to undo, got a dry run or one that has been undone already")
        self._undo()
        self._undo = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "dry_run": self.dry_run,
            "neurons": [row.to_dict() for row in self.rows],
            "left_alone": dict(self.left_alone),
        }

    def __str__(self) -> str:
        count = f"{len(self.rows)} neuron{'' if len(self.rows) == 1 else 's'} fused"
        lines = [count, *(["dry run: nothing was changed"] if self.dry_run else []), HALF, ""]
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for row in self.rows:
            groups.setdefault(tuple(_details(row)), []).append(" = ".join(row.paths))
        cells = [("neuron", "", "")]
        for details, paths in groups.items():
            cells += group_lines(paths, list(details))
        for path, why in self.left_alone.items():
            cells += group_lines([path], [("left alone", why)])
        return "\n".join([*lines, *aligned(cells)])


def _details(row: FuseRow) -> list[tuple[str, str]]:
    parameters = f"; parameters {', '.join(row.parameters)}" if row.parameters else ""
    details = [("fused", f"{row.neuron.__name__}: states {', '.join(row.states)}{parameters}")]
    if row.note:
        details.append(("note", row.note))
    if row.differences is not None:
        found = ", ".join(
            f"{name} {value:.1e}" if value else f"{name} equal" for name, value in row.differences.items()
        )
        details.append(("verified", found))
    return details
