"""Recipes decide how networks are trained. They are small TOML files.

A file holds the fields of :class:`Recipe` by name, and under ``[published]`` the accuracies that its source reports.
This module is imported quickly, as the command line needs it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from .._checks import check_bool, check_choice, check_number, check_positive, nearest
from ..models.neurons import canonical_name
from . import toml

__all__ = ["LOSS_NAMES", "OPTIMIZERS", "PRECISIONS", "Recipe", "check_seeds", "load_recipe", "recipe_names"]

FOLDER = Path(__file__).with_name("recipes")

OPTIMIZERS = ("adam", "sgd")
LOSS_NAMES = ("rate-mse", "cross-entropy", "clif")
PRECISIONS = ("auto", "32-true", "16-mixed", "bf16-mixed", "64-true")
"""Lightning's names; ``auto`` is 16-mixed on a GPU and 32-true on the CPU."""


@dataclass(frozen=True)
class Recipe:
    """How a network with one neuron is trained on a data set.

    ``published[neuron][T]`` is the test accuracy in per cent that ``source`` reports; ``name``, ``tuned``,
    ``source`` and ``published`` have no part in the training.

    :raises TypeError: for a value of another type, naming the field
    :raises ValueError: for a value outside its range, naming the field. Names of networks, data sets and augmentations
        are checked later, when these are made.
    """

    name: str
    network: str
    """A key of :data:`klif_sj.models.NETWORKS`."""
    dataset: str
    neuron: str
    """A key of :data:`klif_sj.models.NEURONS`."""
    time_steps: int
    epochs: int
    batch_size: int
    """Samples that one update sees, on all devices together."""
    learning_rate: float
    """The initial learning rate of the weights; :func:`klif_sj.optim.parameter_groups` derives that of the gates."""
    annealing_epochs: int | None = None
    """T_max of the cosine along which the learning rates fall to 0; None means ``epochs``."""
    optimizer: str = "adam"
    momentum: float = 0.9
    """The momentum of SGD; Adam has none."""
    weight_decay: float = 0.0
    """The decay of the weights; a neuron's own parameters are not decayed."""
    loss: str = "rate-mse"
    augmentations: tuple[str, ...] = ()
    width: float = 1.0
    """Factor on the network's channels and features."""
    coding: bool | None = None
    """Whether the ablation's networks get the KLIF paper's coding layers; None leaves that to the network."""
    dropout: float | None = None
    """The rate of vgg11's dropout; None keeps the network's own."""
    precision: str = "auto"
    gradient_clip: float | None = None
    """The largest norm of the gradient; None clips nothing."""
    validation: float = 0
    """The part of the training set that the seed puts aside: a fraction below 1, or a number of samples. This part is
    evaluated in place of the test set, which is then not read."""
    seed: int = 0
    backend: str = "auto"
    channels_last: bool = True
    threads: int | None = None
    """The number of CPU threads in each process; None leaves it to torch."""
    tuned: tuple[str, ...] = ()
    """The fields whose values were chosen for this neuron, on validation samples."""
    source: str = ""
    published: dict[str, dict[int, float]] = field(default_factory=dict)

    UNTRAINED = ("name", "tuned", "source", "published")
    """The fields that no weight depends on."""

    def __post_init__(self) -> None:
        for name in ("name", "network", "dataset", "neuron", "backend", "source"):
            _check_text(name, getattr(self, name))
        for name in ("time_steps", "epochs", "batch_size"):
            _check_integer(name, getattr(self, name), least=1)
        _check_seed(self.seed)
        for name in ("annealing_epochs", "threads"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), least=1)
        for name in ("learning_rate", "width"):
            self._set(name, check_positive(name, getattr(self, name)))
        for name in ("momentum", "weight_decay"):
            self._set(name, check_number(name, getattr(self, name)))
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if check_number("validation", self.validation) < 0 or (self.validation >= 1 and type(self.validation) is float):
            raise ValueError(f"validation: expected a fraction below 1 or a number of samples, got {self.validation}")
        if self.gradient_clip is not None:
            self._set("gradient_clip", check_positive("gradient_clip", self.gradient_clip))
        if self.coding is not None:
            check_bool("coding", self.coding)
        if self.dropout is not None:
            self._set("dropout", check_number("dropout", self.dropout))
        check_bool("channels_last", self.channels_last)
        for name, choices in (("optimizer", OPTIMIZERS), ("loss", LOSS_NAMES), ("precision", PRECISIONS)):
            check_choice(name, getattr(self, name), choices)
        self._set("neuron", canonical_name(self.neuron))
        for name in ("augmentations", "tuned"):
            self._set(name, _texts(name, getattr(self, name)))
        self.check_names(self.tuned)
        self._set("published", _published(self.published))

    def _set(self, name: str, value: Any) -> None:
        """Gives a field its canonical form, while this frozen instance is being made."""
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe with these values, as :meth:`as_dict` returns them.

        :raises ValueError: for an unknown field, suggesting the nearest name, or a missing one
        """
        cls.check_names(values)
        required = [
            recipe_field.name
            for recipe_field in fields(cls)
            if recipe_field.default is MISSING and recipe_field.default_factory is MISSING
        ]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"recipe: expected the fields {', '.join(required)}, got no {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Check that all names are fields.

        :raises ValueError: for a name that is no field, suggesting the nearest one
        """
        known = [recipe_field.name for recipe_field in fields(cls)]
        for name in names:
            if name not in known:
                raise ValueError(f"recipe: expected the fields {', '.join(known)}, got {name!r}{nearest(name, known)}")

    def override(self, **given: Any) -> Recipe:
        """This recipe with the values that are given in place of its own.

        :raises ValueError: for an unknown field, suggesting the nearest name
        """
        self.check_names(given)
        return Recipe(
            **{**{recipe_field.name: getattr(self, recipe_field.name) for recipe_field in fields(self)}, **given}
        )

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for JSON and checkpoints."""
        values = {recipe_field.name: getattr(self, recipe_field.name) for recipe_field in fields(self)}
        values |= {name: list(values[name]) for name in ("augmentations", "tuned")}
        values["published"] = {
            neuron: {str(time_steps): accuracy for time_steps, accuracy in figures.items()}
            for neuron, figures in self.published.items()
        }
        return values

    def differences(self, other: Recipe) -> list[str]:
        """The fields that make a training by ``other`` differ from one by this recipe, each with both values."""
        return [
            f"{recipe_field.name}: {getattr(other, recipe_field.name)!r} then, {getattr(self, recipe_field.name)!r} now"
            for recipe_field in fields(self)
            if recipe_field.name not in self.UNTRAINED
            and getattr(other, recipe_field.name) != getattr(self, recipe_field.name)
        ]

    @property
    def published_accuracy(self) -> float | None:
        """The test accuracy in per cent that the source reports for this neuron and T; None if it reports none."""
        return self.published.get(self.neuron, {}).get(self.time_steps)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe with this name, or in this file, whose name must end in ``.toml``.

    :raises FileNotFoundError: for a file that is not there
    :raises ValueError: for an unknown name, suggesting the nearest one, or a file that holds no recipe
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in recipe_names():
            raise ValueError(
                f"recipe: expected a file *.toml or one of {', '.join(recipe_names())}, "
                f"got {str(name_or_path)!r}{nearest(str(name_or_path), recipe_names())}"
            )
        path = FOLDER / f"{name_or_path}.toml"
    try:
        return Recipe.from_dict({"name": path.stem, **toml.loads(path.read_text())})
    except FileNotFoundError:
        raise FileNotFoundError(f"recipe: there is no file {path}") from None
    except (ValueError, TypeError) as error:  # TOML's and Unicode's errors are ValueErrors
        raise ValueError(f"{path}: {error}") from error


def _check_seed(seed: object) -> None:
    """Check that a seed is an integer from 0 to below 2**32.

    torch's generator on the CPU would take the lowest 32 bits of a larger integer, which are the seed of another run.

    :raises TypeError, ValueError: for any other value
    """
    _check_integer("seed", seed, least=0)
    if seed >= 2**32:  # type: ignore[operator]
        raise ValueError(f"seed: expected an integer below 2**32, got {seed}")


def check_seeds(seeds: Sequence[int]) -> None:
    """Check that there is at least one seed, and that all seeds are valid and different.

    :raises TypeError, ValueError: if not
    """
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    for seed in seeds:
        _check_seed(seed)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected each of them once, got {', '.join(map(str, seeds))}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a text, got {value!r}")


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name}: expected a list of names, got {value!r}")
    return tuple(value)


def _published(value: object) -> dict[str, dict[int, float]]:
    try:
        return {
            canonical_name(neuron): {
                int(time_steps): check_positive("accuracy", accuracy) for time_steps, accuracy in figures.items()
            }
            for neuron, figures in value.items()  # type: ignore[attr-defined]
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"published: expected accuracies by neuron and T, got {value!r} ({error})") from error
