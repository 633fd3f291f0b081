"""Choose the values of a recipe for each neuron on validation samples, without the test set."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..._environment import environment
from ...models.neurons import canonical_name
from ..atomic import write_json
from ..data.images import Split
from ..divergence import DivergenceError
from ..recipe import Recipe, check_seeds
from ..run import TrainingRun
from .paper_tables import as_text, title_of
from .summary import markdown_table

__all__ = ["Tuned", "Tuning"]

NO_CHOICE = ("dataset", "neuron", "seed", "validation", *Recipe.UNTRAINED)
"""Fields that a grid cannot contain, as they are no setting of a training."""


@dataclass(frozen=True)
class Tuned:
    """What a tuning found: the contents of its ``tuned.json``."""

    file: Path
    found: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Tuned:
        """Read the file of a tuning.

        :raises ValueError: for any other file
        """
        try:
            contents = json.loads(file.read_text())
            Recipe.from_dict(contents["recipe"])
            if not isinstance(contents["best"], dict):
                raise TypeError(f"best: {contents['best']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: expected what klif-sj tune writes, got something else ({error!r})") from error
        return cls(file, contents)

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with the values that are best for its neuron.

        :raises ValueError: if another recipe was tuned, or this neuron was not
        """
        best, name = self.found["best"], self.found["recipe"]["name"]
        if recipe.name != name:
            raise ValueError(f"{self.file}: the recipe {name} was tuned, not {recipe.name}")
        if recipe.neuron not in best:
            raise ValueError(f"{self.file}: {', '.join(best)} were tuned, not {recipe.neuron}")
        return recipe.override(**best[recipe.neuron], tuned=tuple(best[recipe.neuron]))

    def table(self) -> str:
        """The validation accuracies in Markdown, a column for each neuron; the best ones are bold."""
        tried, best = self.found["tried"], self.found["best"]

        def cells(setting: dict[str, Any]) -> Iterator[str]:
            yield ", ".join(f"{title_of(field)} {as_text(value)}" for field, value in setting.items())
            for neuron, results in tried.items():
                (accuracy,) = (result["validation_accuracy"] for result in results if result["setting"] == setting)
                text = "diverged" if accuracy is None else f"{accuracy:.2f}"
                yield f"**{text}**" if setting == best[neuron] else text

        settings = [result["setting"] for result in next(iter(tried.values()))]
        return markdown_table(["validation accuracy, %", *tried], map(list, map(cells, settings)))


class Tuning:
    """Trains each neuron with each combination of the grid's values, on all but the validation samples, in ``out``.

    :param recipe: the values that the grid does not choose; it must put validation samples aside, which each seed draws
    :param neurons: keys of :data:`klif_sj.models.NEURONS`
    :param grid: the values to choose from, by the field of the recipe
    :param seeds: each trains every combination once; the mean accuracy decides
    :param out: folder of ``tuned.json`` and ``runs``, from which the next call goes on
    :raises ValueError: before anything is run, for a recipe without validation samples, an empty grid, a field that is
        unknown or no setting, a value that the recipe refuses
    """

    def __init__(
        self,
        recipe: Recipe,
        neurons: Sequence[str],
        grid: Mapping[str, Sequence[Any]],
        seeds: Sequence[int],
        out: Path,
    ) -> None:
        if not recipe.validation:
            raise ValueError("validation: expected a fraction or number of training samples to choose on, got 0")
        if not neurons or not grid or not all(grid.values()):
            raise ValueError("tune: expected at least one neuron, one field in the grid, and one value of each field")
        Recipe.check_names(grid)
        for field in grid:
            if field in NO_CHOICE:
                raise ValueError(f"grid: expected settings of a training, such as learning_rate, got {field!r}")
        check_seeds(seeds)
        self.recipe, self.grid, self.out, self.seeds = recipe, grid, out, seeds
        values = [dict.fromkeys(values) for values in grid.values()]
        self.settings = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*values)]
        self.recipes = {
            neuron: [
                [recipe.override(neuron=neuron, seed=seed, **setting) for seed in seeds] for setting in self.settings
            ]
            for neuron in dict.fromkeys(map(canonical_name, neurons))
        }

    @property
    def file(self) -> Path:
        """The file that :meth:`run` writes."""
        return self.out / "tuned.json"

    def run(self, console: Console, *, command: str = "", **how: Any) -> Tuned:
        """Train the runs that have no result in the folder yet, and write ``tuned.json``, which :class:`Tuned` reads.

        If settings are equally good, the first one in the grid counts as the best.

        :param console: shows progress
        :param command: the command line, for the file
        :param how: ``data_root``, ``devices`` and ``accelerator`` of :class:`~klif_sj.training.run.TrainingRun`
        :raises ValueError, FileNotFoundError: as ``TrainingRun``, also if a run in the folder follows another recipe
        :raises klif_sj.training.divergence.DivergenceError: if all trainings of a neuron diverged
        """
        splits: dict[str, Split] = {}
        tried: dict[str, list[dict[str, Any]]] = {}
        for neuron, by_setting in self.recipes.items():
            tried[neuron] = []
            for setting, recipes in zip(self.settings, by_setting, strict=True):
                accuracies = []
                for recipe in recipes:
                    chosen = [f"{title_of(field)}{as_text(value)}" for field, value in setting.items()]
                    name = "-".join([neuron, *chosen, f"seed{recipe.seed}"]).replace(" ", "-")
                    console.print(f"[bold]{name}[/bold]")
                    run = TrainingRun(
                        recipe, self.out / "runs" / name, resume=True, command=command, splits=splits, **how
                    )
                    try:
                        accuracies.append(100 * run.run(console)["validation_accuracy"])
                    except DivergenceError as error:
                        console.print(f"{name}: {error}")
                        accuracies.append(None)
                mean = None if None in accuracies else statistics.fmean(accuracies)
                tried[neuron].append({"setting": setting, "validation_accuracy": mean, "of_each_seed": accuracies})
        contents = {
            "recipe": self.recipe.as_dict(),
            "grid": {field: list(values) for field, values in self.grid.items()},
            "seeds": list(self.seeds),
            "tried": tried,
            "best": {neuron: _best(neuron, results) for neuron, results in tried.items()},
            "command": command,
            "environment": environment(),
        }
        write_json(self.file, contents)
        return Tuned(self.file, contents)


def _best(neuron: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    finished = [result for result in results if result["validation_accuracy"] is not None]
    if not finished:
        raise DivergenceError(f"{neuron}: the training diverged with every setting of the grid")
    return max(finished, key=lambda result: result["validation_accuracy"])["setting"]
