"""klif-sj train: one network by a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..models.neurons import NEURONS
from ..usage import UserError, require_train_extra
from . import toml
from .recipe import Recipe, load_recipe, recipe_names

__all__ = ["FLAGS", "add_overrides", "add_train", "parse_setting", "recipe_of"]

FLAGS: dict[str, tuple[type, str]] = {
    "neuron": (str, f"of {', '.join(NEURONS)}"),
    "epochs": (int, "default: the recipe's, here and below"),
    "time_steps": (int, "T, how often an image is shown or how many frames events become"),
    "batch_size": (int, "of one update, on all devices together"),
    "width": (float, "factor on the published layer sizes"),
    "learning_rate": (float, "at the start"),
    "precision": (str, "auto, 32-true, 16-mixed, bf16-mixed or 64-true"),
    "gradient_clip": (float, "largest norm of the gradient"),
    "backend": (str, "of our neurons: auto, torch, cpp or cupy"),
    "seed": (int, "of initial weights, order, augmentation and dropout"),
}
"""The fields of a recipe that have an option of their own."""


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``klif-sj train``: a network by a recipe."""
    parser = commands.add_parser(
        "train",
        help="train a network as a paper did",
        description="Train a network by a recipe, which is one of those that come with the package or a TOML file. "
        "Every value of it can be overridden. The folder --out gets a checkpoint after every epoch, logs for "
        "TensorBoard and as CSV, and result.json. On several nodes: torchrun ... -m klif_sj train ...",
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help="a recipe or a file *.toml")
    what.add_argument("--list", action="store_true", help="list the recipes and end")
    add_overrides(parser, FLAGS)
    add("--out", type=Path, metavar="DIR", help="default: klif-sj-train/RECIPE-NEURON")
    add("--resume", action="store_true", help="go on with the training that was interrupted in --out")
    parser.set_defaults(run=train)


def add_overrides(parser: argparse.ArgumentParser, fields: Iterable[str]) -> None:
    """What every training takes: options for these fields of a recipe, ``--set`` for any, and where it runs."""
    add = parser.add_argument
    for name in fields:
        kind, text = FLAGS[name]
        add(f"--{name.replace('_', '-')}", type=kind, metavar="VALUE", help=text)
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any value of a recipe, as TOML writes it, or none; may be given repeatedly",
    )
    add("--data-root", type=Path, default=Path("data"), metavar="DIR", help="folder of the data sets (default: data)")
    add("--devices", type=int, metavar="N", help="processes with a device each (default: 1, or those of torchrun)")
    add("--accelerator", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")


def train(options: argparse.Namespace) -> None:
    """Train, and say what came out beside what was published."""
    if options.list:
        _print_recipes()
        return
    require_train_extra()
    from rich.console import Console

    from .divergence import DivergenceError
    from .loop import is_first_process
    from .run import TrainingRun

    console = Console(quiet=not is_first_process())
    try:
        recipe = recipe_of(options)
        run = TrainingRun(
            recipe,
            options.out or Path("klif-sj-train", f"{recipe.name}-{recipe.neuron}"),
            data_root=options.data_root,
            devices=options.devices,
            accelerator=options.accelerator,
            resume=options.resume,
            command=options.command,
        )
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise UserError(error) from error
    try:
        result = run.run(console)
    except KeyboardInterrupt:
        print("\nThe epochs that were finished are saved; the same command with --resume goes on.", file=sys.stderr)
        raise
    except (DivergenceError, OSError) as error:
        raise UserError(error) from error
    published = f"; published: {recipe.published_accuracy:g} %" if recipe.published_accuracy else ""
    console.print(f"Test accuracy after {recipe.epochs} epochs: {100 * result['test_accuracy']:.2f} %{published}")
    console.print(f"Result: {run.result}")


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for, with all that it overrides.

    :raises ValueError: for an unknown recipe, field or value
    """
    given = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    return load_recipe(options.recipe).override(**dict(map(parse_setting, options.set)), **given)


def parse_setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` as a name and a value: as TOML writes it, ``none``, or, where it is neither, a text.

    :raises ValueError: for a text without a name
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--set: expected NAME=VALUE, such as momentum=0.9, got {text!r}")
    name, value = name.strip().replace("-", "_"), value.strip()
    if value.lower() == "none":
        return name, None
    try:
        return name, toml.loads(f"value = {value}")["value"]
    except toml.TOMLDecodeError:
        return name, value


def _print_recipes() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    table = [("recipe", "network", "data set", "T", "epochs", "published for, %")]
    for recipe in recipes:
        figures = (
            f"{neuron} {', '.join(f'{accuracy:g} (T = {t})' for t, accuracy in by_time_steps.items())}"
            for neuron, by_time_steps in recipe.published.items()
        )
        row = (recipe.network, recipe.dataset, str(recipe.time_steps), str(recipe.epochs), "; ".join(figures))
        table.append((recipe.name, *row))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
