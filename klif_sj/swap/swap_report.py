"""The report of what a swap did, or would do: it becomes a table or a dict, and can undo the swap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..network.report import Report, count, full_name
from .neuron_settings import plain
from .translate import ADDED, CHANGED, DROPPED, KEPT, OVERRIDDEN, WHAT, Entry

SEPARATE = (DROPPED, CHANGED)
"""The kinds of entries that get a line each in a table, because each comes with a reason."""


@dataclass(frozen=True)
class SwapRow:
    """One neuron of a swap."""

    paths: tuple[str, ...]
    """The neuron's path in the network, or its several paths if it is shared."""
    old: type
    new: type
    entries: tuple[Entry, ...]
    """What became of every setting."""
    added_keys: tuple[str, ...] = ()
    """Keys that the state dict has since the swap."""
    removed_keys: tuple[str, ...] = ()
    """Keys that the state dict no longer has."""

    def of(self, what: str) -> dict[str, Entry]:
        """The ``'kept'``, ``'overridden'``, ``'dropped'``, ``'changed'`` or ``'added'`` entries, by name."""
        return {entry.name: entry for entry in self.entries if entry.what == what}

    def details(self) -> Iterator[tuple[str, str]]:
        """What happened to the neuron, as pairs of a word and a text."""
        yield "swapped", f"{_name(self.old)} -> {_name(self.new)}"
        for what in WHAT:
            texts = [str(entry) for entry in self.of(what).values()]
            if what in SEPARATE:
                yield from ((what, text) for text in texts)
            elif texts:
                yield what, ", ".join(texts)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return {
            "paths": list(self.paths),
            "old": full_name(self.old),
            "new": full_name(self.new),
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
class SwapReport(Report[SwapRow]):
    """What :func:`klif_sj.swap_neurons` did to a network; ``print`` it for a table.

    ``rows`` are the neurons that were swapped; ``left_alone`` says, by path, why others were not. ``undo()`` puts the
    old neurons back into their places: the same objects, as they were at the swap.
    """

    ACT = "swap"
    COLUMN = "settings"

    @property
    def added_keys(self) -> list[str]:
        """The keys that only the swapped network's state dict has.

        ``load_state_dict`` reports them as missing when the swapped network loads an old checkpoint, and as unexpected
        when the old network loads a new checkpoint.
        """
        return [key for row in self.rows for key in row.added_keys]

    @property
    def removed_keys(self) -> list[str]:
        """The keys that only the old network's state dict has."""
        return [key for row in self.rows for key in row.removed_keys]

    def heading(self) -> list[str]:
        """The lines above the table."""
        counts = Counter((_name(row.old), _name(row.new)) for row in self.rows)
        lines = [f"{count(number, 'swapped')}: {old} -> {new}" for (old, new), number in counts.items()]
        return lines or [count(0, "swapped")]


def _name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
