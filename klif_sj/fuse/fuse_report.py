"""The report of what a call of ``fuse`` did to a network: it becomes a table or a dict, and can undo the call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..network.report import Report, count, full_name

HALF = "16-bit input: states and arithmetic are float32, where SpikingJelly's own are 16-bit"


@dataclass(frozen=True)
class FuseRow:
    """One neuron that was fused."""

    paths: tuple[str, ...]
    """The neuron's path in the network, or its several paths if it is shared."""
    neuron: type
    """The neuron's own class."""
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    """The neuron's own tensors that its step reads."""
    note: str = ""
    """How the fused neuron differs from what SpikingJelly runs."""
    differences: Mapping[str, float] | None = None
    """With ``verify=True``, for each quantity the largest difference from the neuron's own eager code, relative to the
    largest value."""

    def details(self) -> list[tuple[str, str]]:
        """What happened to the neuron, as pairs of a word and a text."""
        parameters = f"; parameters {', '.join(self.parameters)}" if self.parameters else ""
        details = [("fused", f"{self.neuron.__name__}: states {', '.join(self.states)}{parameters}")]
        if self.note:
            details.append(("note", self.note))
        if self.differences is not None:
            differences = ", ".join(
                f"{name} {value:.1e}" if value else f"{name} equal" for name, value in self.differences.items()
            )
            details.append(("verified", differences))
        return details

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return {
            "paths": list(self.paths),
            "neuron": full_name(self.neuron),
            "states": list(self.states),
            "parameters": list(self.parameters),
            "note": self.note,
            "differences": None if self.differences is None else dict(self.differences),
        }


@dataclass
class FuseReport(Report[FuseRow]):
    """What :func:`klif_sj.fuse` did to a network; ``print`` it for a table.

    ``rows`` are the neurons that were fused; ``left_alone`` says, by path, why others were not. ``undo()`` gives every
    neuron its own class back, with the states that it has then.
    """

    ACT = "fuse"

    def heading(self) -> list[str]:
        """The lines above the table."""
        return [count(len(self.rows), "fused"), HALF]
