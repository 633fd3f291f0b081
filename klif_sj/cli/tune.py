"""``klif-sj tune`` chooses the values of a recipe that suit each neuron, without the test set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._checks import name_and_value
from ..training.recipe import load_recipe
from .errors import require_train_extra, user_errors
from .recipe_options import FLAGS, add_data_root, add_device, add_overrides, names, overrides, parse_value, seeds

VALIDATION = 0.1


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj tune``."""
    parser = commands.add_parser(
        "tune",
        help="choose values of a recipe for each neuron on validation samples",
        description="Train each neuron with each value of a grid on all of the training set but validation samples, "
        "which are put aside by the seed, and write the best of each to tuned.json in --out, for klif-sj reproduce "
        "--tuned. The test set is not read. An interrupted tuning goes on with the same command.",
    )
    add = parser.add_argument
    add("--recipe", required=True, metavar="NAME", help="a recipe or a file *.toml")
    add("--neurons", type=names, default=("lif", "klif"), metavar="NAMES", help="default: lif,klif")
    add(
        "--grid",
        action="append",
        required=True,
        metavar="NAME=VALUES",
        help="a field of the recipe and its values, such as learning_rate=1e-4,1e-3; of several, all combinations",
    )
    add("--seeds", type=seeds, default=(0,), metavar="SEEDS", help="the mean over them decides (default: 0)")
    add_overrides(parser, (name for name in FLAGS if name not in ("neuron", "seed")))
    add_data_root(parser)
    add_device(parser)
    add("--out", type=Path, default=Path("klif-sj-tune"), metavar="DIR", help="default: klif-sj-tune")
    parser.set_defaults(run=tune, when_interrupted="What was finished is saved; the same command goes on.")


def tune(options: argparse.Namespace) -> None:
    """Run what is missing, print the validation accuracies, and say where the best values are."""
    require_train_extra()
    from rich.console import Console
    from rich.markdown import Markdown

    from ..training.divergence import DivergenceError
    from ..training.reports.tuning import Tuning

    console = Console()
    with user_errors():
        recipe = load_recipe(options.recipe)
        recipe = recipe.override(**{"validation": recipe.validation or VALIDATION, **overrides(options)})
        tuning = Tuning(recipe, options.neurons, _grid(options.grid), options.seeds, options.out)
    with user_errors(ValueError, OSError, DivergenceError):
        tuned = tuning.run(
            console, data_root=options.data_root, accelerator=options.accelerator, command=options.command
        )
    console.print(Markdown(tuned.table()))
    console.print(f"The best of each neuron, for klif-sj reproduce --tuned: {tuned.file}")


def _grid(texts: list[str]) -> dict[str, list[Any]]:
    """The values by field. Each value is read as the value of ``--set`` is.

    :raises ValueError: for a text without a name or a value, or a field that comes twice
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, values = name_and_value("--grid", text, "NAME=VALUES, such as learning_rate=1e-4,1e-3")
        field = name.replace("-", "_")
        if field in grid:
            raise ValueError(f"--grid: expected each field once, got {field} twice")
        grid[field] = [parse_value(value) for value in values.split(",")]
    return grid
