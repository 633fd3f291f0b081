"""The report of what a call did to a network's neurons: it becomes a table or a dict, and can undo the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from .table import aligned, group_lines


class Row(Protocol):
    """One neuron that was changed."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The neuron's path in the network, or its several paths if it is shared."""

    def details(self) -> Iterable[tuple[str, str]]:
        """What happened to the neuron, as pairs of a word and a text."""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass
class Report(Generic[AnyRow]):
    """What was done to a network; ``print`` it for a table."""

    rows: tuple[AnyRow, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    """By path, why a neuron was left alone."""
    dry_run: bool = False
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    ACT: ClassVar[str]
    """What was done, as a noun."""
    COLUMN: ClassVar[str] = ""
    """The heading of the table's last column."""

    def heading(self) -> list[str]:
        """The lines above the table."""
        raise NotImplementedError

    def undo(self) -> None:
        """Undo what was done to the neurons.

        :raises RuntimeError: if there is nothing to undo, or if something else has changed a neuron since; then nothing
            is changed
        """
        if self._undo is None:
            raise RuntimeError(f"expected a {self.ACT} to undo, got a dry run or one that has been undone already")
        self._undo()
        self._undo = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "dry_run": self.dry_run,
            "neurons": [row.to_dict() for row in self.rows],
            "left_alone": dict(self.left_alone),
        }

    def __str__(self) -> str:
        lines = [*self.heading(), *(["dry run: nothing was changed"] if self.dry_run else []), ""]
        cells = [("neuron", "", self.COLUMN), *(line for group in self._groups() for line in group_lines(*group))]
        return "\n".join([*lines, *aligned(cells)])

    def _groups(self) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
        """The paths of all neurons to which the same happened, and the details of what happened."""
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for row in self.rows:
            groups.setdefault(tuple(row.details()), []).append(" = ".join(row.paths))
        for details, paths in groups.items():
            yield paths, list(details)
        for path, why in self.left_alone.items():
            yield [path], [("left alone", why)]


def count(number: int, participle: str) -> str:
    """A text such as ``2 neurons fused``."""
    return f"{number} neuron{'' if number == 1 else 's'} {participle}"


def full_name(cls: type) -> str:
    """The name of a class in a report."""
    return f"{cls.__module__}.{cls.__qualname__}"
