"""What a comparison is told: data set, neurons, what differs from the recipe. Light to import, for the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .._checks import nearest
from ..models.neurons import canonical_name
from .recipe import Recipe, check_seed, load_recipe

__all__ = ["RECIPES", "WIDTHS", "Settings", "find_recipe"]

WIDTHS = {"small": 1 / 8, "medium": 1 / 4, "paper": 1.0}
"""Factors on the paper's 128 channels and 2048 features, by name."""


RECIPES = {"digits": "digits", "mnist": "klif-mnist", "fashion-mnist": "klif-fashion-mnist"}
"""By data set, the recipe that a comparison takes its values from: of those that train the network it compares on."""


def find_recipe(dataset: str) -> Recipe:
    """:raises ValueError: for a data set without one, suggesting the nearest name"""
    if dataset not in RECIPES:
        raise ValueError(f"dataset: expected one of {', '.join(RECIPES)}, got {dataset!r}{nearest(dataset, RECIPES)}")
    return load_recipe(RECIPES[dataset])


@dataclass(frozen=True)
class Settings:
    """Everything that determines a comparison's result, and where it runs.

    :raises ValueError: for a value outside its range, naming the setting
    """

    dataset: str
    neurons: tuple[str, ...]
    epochs: int
    time_steps: int
    width: float
    batch_size: int
    learning_rate: float
    threads: int | None
    seed: int
    backend: str
    device: str
    data_root: Path

    MAY_CHANGE = ("neurons", "device", "data_root")
    """What a resumed comparison may do differently; everything else would change a neuron's result."""

    OF_THE_RECIPE = ("epochs", "time_steps", "width", "batch_size", "learning_rate", "threads")
    """What the data set's recipe says where nothing is given."""

    def __post_init__(self) -> None:
        find_recipe(self.dataset)
        if not self.neurons:
            raise ValueError("neurons: expected at least one name, got none")
        for name in self.neurons:
            canonical_name(name)
        for name in ("epochs", "time_steps", "batch_size", "threads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected a positive integer, got {number}")
        check_seed(self.seed)
        for name in ("width", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")

    @classmethod
    def for_dataset(cls, dataset: str, *, neurons: tuple[str, ...], **given: Any) -> Settings:
        """The data set's recipe, with every value in ``given`` that is not None in its place."""
        recipe = find_recipe(dataset)
        values = {name: getattr(recipe, name) for name in cls.OF_THE_RECIPE}
        values.update((name, value) for name, value in given.items() if value is not None)
        # A neuron that is named twice, under whatever alias, is trained once.
        names = tuple(dict.fromkeys(canonical_name(name) for name in neurons))
        return cls(dataset=dataset, neurons=names, **values)

    def on_device(self) -> Settings:
        """These settings with ``device`` resolved: ``'auto'`` is the first GPU, or the CPU where there is none.

        :raises ValueError: for a device that is unknown or absent
        """
        if self.device == "auto":
            return replace(self, device="cuda:0" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        if device.type == "cpu":
            return replace(self, device="cpu")
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= found:
            raise ValueError(
                f"device: {self.device!r} is not here; this PyTorch ({torch.__version__}) sees {found} GPUs. "
                "Use --device cpu, or see `klif-sj info`"
            )
        return replace(self, device=f"cuda:{index}")

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The settings that decide a neuron's result and differ from ``other``, each with both values."""
        return [
            f"{name}: {other.get(name)!r} then, {value!r} now"
            for name, value in self.as_dict().items()
            if name not in self.MAY_CHANGE and other.get(name) != value
        ]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
