"""What the pictures and the page both need: the names of providers and neurons, and rows that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .rows import FILE, Row, read_rows

OURS = {"cuda": "klif_sj cupy", "cpu": "klif_sj cpp"}
"""By device, the provider that ``backend='auto'`` stands for."""

LIMIT = "copy"

NEURONS = {
    "klif": "KLIF",
    "clif": "CLIF",
    "glif-channel": "GLIF, channel-wise",
    "glif-layer": "GLIF, layer-wise",
    "lif": "LIF",
    "user": "A user's own neuron",
    "fused-lif": "SpikingJelly's LIFNode, fused",
    "fused-plif": "SpikingJelly's ParametricLIFNode, fused",
    "fused-qif": "SpikingJelly's QIFNode, fused",
    "fused-eif": "SpikingJelly's EIFNode, fused",
    "fused-izhikevich": "SpikingJelly's IzhikevichNode, fused",
}

COMPARISON = ("suite", "workload", "pass", "launch")


def machines(results: Path) -> dict[str, list[Row]]:
    """The rows of every machine's folder."""
    return {path.parent.name: read_rows(path) for path in sorted(results.glob(f"*/{FILE}"))}


def is_rival(row: Row) -> bool:
    """Whether a row is that of a rival. Our own equations in plain torch, compiled or not, count as a rival."""
    return not row["provider"].startswith(OURS[row["device"]]) and row["provider"] != LIMIT


def compared(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The rows of each workload and pass, by provider. If a measurement was repeated, its last row counts."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in COMPARISON), {})[row["provider"]] = row
    return list(groups.values())


def any_of(group: dict[str, Row]) -> Row:
    return next(iter(group.values()))


def ours(group: dict[str, Row]) -> Row | None:
    """The row of our default backend, if it has a time."""
    row = group.get(OURS[any_of(group)["device"]])
    return row if row and row["median_us"] else None


def losses(rows: Iterable[Row]) -> Iterator[tuple[float, Row, Row]]:
    """For each rival that took less time than our default backend: how many times less, its row, and ours."""
    for group in compared(rows):
        own = ours(group)
        for row in group.values():
            if own and is_rival(row) and row["median_us"] and row["median_us"] < own["median_us"]:
                yield own["median_us"] / row["median_us"], row, own
