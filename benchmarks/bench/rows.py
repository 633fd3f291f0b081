"""The results are a CSV file with one row for each measurement, which is written as soon as it is made."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "results.csv"

MEASUREMENT = ("suite", "workload", "provider", "pass", "launch")
"""The columns that name a measurement. Together with the commit and the machine they make a row unique."""

FIELDS = (
    *MEASUREMENT,
    "status",
    "neuron",
    "T",
    "neurons",
    "dtype",
    "layout",
    "batch",
    "median_us",
    "quartile1_us",
    "quartile3_us",
    "runs",
    "images_per_s",
    "floor_bytes",
    "gb_per_s",
    "copy_gb_per_s",
    "percent_of_copy",
    "saved_bytes",
    "input_bytes",
    "peak_bytes",
    "error_spikes",
    "error_gradient",
    "error_loss",
    "firing_rate",
    "configuration",
    "device",
    "threads",
    "device_name",
    "allocator",
    "driver",
    "cuda",
    "python",
    "torch",
    "cupy",
    "triton",
    "spikingjelly",
    "commit",
    "date",
)
"""The columns. ``status`` is ``ok`` or says why there is no time: ``refused: ...`` (the layer computes something else),
``failed: ...`` (it raised an error) or ``out of memory``."""

NUMBERS = frozenset(FIELDS[FIELDS.index("median_us") : FIELDS.index("configuration")]) | {
    "T", "neurons", "batch", "threads"
}  # fmt: skip

Row = dict[str, Any]


class Results:
    """The CSV file of a folder, to which rows are added. It knows the measurements that it has, so a run can go on."""

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self.environment = dict(environment)
        self._known: set[tuple[str, ...]] = set()
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._known = {self._key(row) for row in read_rows(self.path)}
        else:
            with self.path.open("w", newline="") as file:
                csv.DictWriter(file, FIELDS).writeheader()

    def has(self, measurement: Mapping[str, Any]) -> bool:
        return self._key({**self.environment, **measurement}) in self._known

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row at once, so that a run that is cut off loses nothing."""
        full = {**self.environment, **row}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow({name: _text(full.get(name)) for name in FIELDS})
        self._known.add(self._key(full))

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_text(row.get(name)) for name in (*MEASUREMENT, "commit", "device_name", "allocator"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file. Numbers become numbers, and empty cells become None.

    :raises ValueError: for a file with other columns, which another version of the harness has written
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: expected the columns {', '.join(FIELDS)}; move the file away and run again")
        return [{name: _value(name, text) for name, text in row.items()} for row in reader]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _value(name: str, text: str) -> str | float | int | None:
    if not text or name not in NUMBERS:
        return text or None
    number = float(text)
    return int(number) if number.is_integer() else number
