"""What a swap did, or would do, as a table, as a dict, and to be undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..network.table import aligned, group_lines
from .neuron_settings import plain
from .translate import ADDED, CHANGED, DROPPED, KEPT, OVERRIDDEN, WHAT, Entry

SEPARATE = (DROPPED, CHANGED)
"""What a table gives a line for each entry, as it comes with a reason."""


@dataclass(frozen=True)
class SwapRow:
    """One neuron of a swap."""

    paths: tuple[str, ...]
    """Where it is: more than one path where it is shared."""
    old: type
    new: type
    entries: tuple[Entry, ...]
    """What became of every setting."""
    added_keys: tuple[str, ...] = ()
    """Keys that the state dict has since the swap."""
    removed_keys: tuple[str, ...] = ()
    """Keys that the state dict no longer has."""

    def of(self, what: str) -> dict[str, Entry]:
        """The entries that are ``'kept'``, ``'overridden'``, ``'dropped'``, ``'changed'`` or ``'added'``, by name."""
        return {entry.name: entry for entry in self.entries if entry.what == what}

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {
            "paths": list(self.paths),
            "old": _full_name(self.old),
            "new": _full_name(self.new),
            KEPT: {name: plain(entry.new) for name, entry in self.of(KEPT).items()},
            ADDED: {name: plain(entry.new) for name, entry in self.of(ADDED).items()},
            OVERRIDDEN: {
                name: {**({"old": plain(entry.old)} if entry.had else {}), "new": plain(entry.new)}
                for name, entry in self.of(OVERRIDDEN).items()
            },
            DROPPED: {name: {"old": plain(entry.old), "why": entry.why} for name, entry in self.of(DROPPED).items()},
            CHANGED: {
                name: {"old": plain(entry.old), "new": plain(entry.new), "why": entry.why}
                for name, entry in self.of(CHANGED).items()
            },
            "added_keys": list(self.added_keys),
            "removed_keys": list(self.removed_keys),
        }


@dataclass
class SwapReport:
    """What :func:`klif_sj.swap_neurons` did to a network; ``print`` it for a table."""

    rows: tuple[SwapRow, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    """Neurons that were not swapped, by path, and why."""
    dry_run: bool = False
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def added_keys(self) -> list[str]:
        """Keys of the swapped network's state dict that the old one's has not: ``load_state_dict`` of an old
        checkpoint finds them missing, of a new one into the old network unexpected."""
        return [key for row in self.rows for key in row.added_keys]

    @property
    def removed_keys(self) -> list[str]:
        """Keys of the old network's state dict that the swapped one's has not."""
        return [key for row in self.rows for key in row.removed_keys]

    def undo(self) -> None:
        """Put the very same old neurons back where they were, as they were at the swap.

        :raises RuntimeError: if there is nothing to undo, or if one of the places has got another neuron since;
            nothing is changed then
        """
        if self._undo is None:
            raise RuntimeError("expected a swap to undo, got a dry run or one that has been undone already")
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
        counts = Counter((_name(row.old), _name(row.new)) for row in self.rows)
        lines = [f"{_count(number)}: {old} -> {new}" for (old, new), number in counts.items()] or [_count(0)]
        if self.dry_run:
            lines.append("dry run: nothing was changed")
        cells = [("neuron", "", "settings"), *(line for group in self._groups() for line in group_lines(*group))]
        for path, why in self.left_alone.items():
            cells += group_lines([path], [("left alone", why)])
        return "\n".join([*lines, "", *aligned(cells)])

    def _groups(self) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
        """The paths of neurons to which the same happened, and what did."""
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for row in self.rows:
            path = " = ".join(row.paths)
            groups.setdefault(tuple(_details(row)), []).append(path)
        for details, paths in groups.items():
            yield paths, list(details)


def _details(row: SwapRow) -> Iterator[tuple[str, str]]:
    yield "swapped", f"{_name(row.old)} -> {_name(row.new)}"
    for what in WHAT:
        texts = [str(entry) for entry in row.of(what).values()]
        if what in SEPARATE:
            yield from ((what, text) for text in texts)
        elif texts:
            yield what, ", ".join(texts)


def _count(number: int) -> str:
    return f"{number} neuron{'' if number == 1 else 's'} swapped"


def _name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
