"""The KLIF paper's tables: which recipe and neuron stand behind each figure, and how a run differs from it.

The figures themselves are in the recipes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..._checks import nearest
from ..recipe import Recipe, load_recipe

__all__ = ["TABLES", "Figure", "Table", "as_text", "changes", "run_name", "size_name", "size_title", "title_of"]


@dataclass(frozen=True)
class Figure:
    """One figure of a table: a recipe and a neuron, under the name of the table's row."""

    row: str
    recipe: str
    neuron: str

    def as_published(self) -> Recipe:
        """The recipe as the paper runs it; its ``published_accuracy`` is the figure, in per cent."""
        return load_recipe(self.recipe).override(neuron=self.neuron)


@dataclass(frozen=True)
class Table:
    """A table of the paper (arXiv 2302.09238)."""

    number: int
    title: str
    figures: tuple[Figure, ...]

    def select(
        self, *, datasets: Sequence[str] = (), networks: Sequence[str] = (), neurons: Sequence[str] = ()
    ) -> list[Figure]:
        """The figures on these data sets, networks and neurons, in the table's order; on all where none are named.

        :raises ValueError: for a name that the table does not have, suggesting the nearest; for names that the table
            has, but in no figure together
        """
        chosen = {figure: figure.as_published() for figure in self.figures}
        for field, names in (("dataset", datasets), ("network", networks), ("neuron", neurons)):
            known = dict.fromkeys(getattr(figure.as_published(), field) for figure in self.figures)
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{field}: expected one of {', '.join(known)}, which Table {self.number} has, "
                        f"got {name!r}{nearest(name, known)}"
                    )
            chosen = {f: recipe for f, recipe in chosen.items() if not names or getattr(recipe, field) in names}
        if not chosen:
            raise ValueError(f"Table {self.number} has no figure of these data sets, networks and neurons together")
        return list(chosen)


DATASETS = ("klif-mnist", "klif-fashion-mnist", "klif-cifar10", "klif-n-mnist", "klif-cifar10-dvs", "klif-dvs-gesture")
ABLATION = ("klif-vgg16", "klif-resnet18")
ABLATION_CODED = ("klif-vgg16-coding", "klif-resnet18-coding")


def _table(number: int, title: str, *rows: tuple[str, str, Iterable[str]]) -> Table:
    """A table of rows, each with its name, its neuron and the recipes of its columns."""
    return Table(
        number, title, tuple(Figure(row, recipe, neuron) for row, neuron, recipes in rows for recipe in recipes)
    )


TABLES = {
    table.number: table
    for table in (
        _table(2, "LIF and KLIF", ("LIF", "lif", DATASETS), ("KLIF", "klif", DATASETS)),
        _table(
            3,
            "k, ReLU and the coding layers",
            ("LIF", "lif", ABLATION),
            ("KLIF, without coding layers", "klif", ABLATION),
            ("only with k", "klif-only-k", ABLATION),
            ("only with ReLU", "klif-only-relu", ABLATION),
            ("KLIF, with coding layers", "klif", ABLATION_CODED),
        ),
        _table(4, "KLIF and KLIF*", ("KLIF", "klif", DATASETS), ("KLIF*", "klif-star", DATASETS)),
        _table(
            5,
            "Other activation functions",
            ("LIF", "lif", ABLATION),
            ("KLIF (ReLU)", "klif", ABLATION),
            ("KLIF (CELU)", "klif-celu", ABLATION),
            ("KLIF (leaky ReLU)", "klif-leaky-relu", ABLATION),
        ),
    )
}
"""The tables of results by number. Table 3 prints KLIF without coding layers twice; here it is one row."""

TUNED = "tuned"
"""This text stands for the value of a field that was chosen for each neuron."""

SAME_EITHER_WAY = ("neuron", "seed", "backend", "channels_last", "threads")
"""Fields in which a run may differ from the published recipe and still count as published."""


def changes(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The fields in which a recipe differs from the published one of its name: its value, and the published one.

    The value of a field that was tuned for each neuron is :data:`TUNED`, so that the runs of all neurons go together.
    """
    published = load_recipe(recipe.name)
    return {
        field.name: (value, paper)
        for field in fields(Recipe)
        if field.name not in (*Recipe.UNTRAINED, *SAME_EITHER_WAY)
        and (value := TUNED if field.name in recipe.tuned else getattr(recipe, field.name))
        != (paper := getattr(published, field.name))
    }


def size_name(recipe: Recipe) -> str:
    """A name that the runs with all neurons share: the recipe's name and its differences from the published one."""
    return "-".join((recipe.name, *_differences(recipe, ""))).replace(" ", "-")


def size_title(recipe: Recipe) -> str:
    """What :func:`size_name` says, for a reader."""
    return f"{recipe.name}: {', '.join(_differences(recipe, ' ')) or 'as published'}"


def _differences(recipe: Recipe, between: str) -> Iterator[str]:
    """Each difference from the published recipe, with a text between the title of a field and its value."""
    for field, (value, _) in changes(recipe).items():
        title = title_of(field)
        yield f"tuned {title}" if value == TUNED else f"{title}{between}{as_text(value)}"


def run_name(recipe: Recipe) -> str:
    """A name for one run, which no run of another size, neuron or seed has."""
    return f"{size_name(recipe)}-{recipe.neuron}-seed{recipe.seed}"


def title_of(field: str) -> str:
    """The name of a recipe's field for a reader."""
    return "T" if field == "time_steps" else field.replace("_", " ")


def as_text(value: Any) -> str:
    """The value of a recipe's field as a short text."""
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
