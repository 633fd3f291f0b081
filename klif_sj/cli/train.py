"""``klif-sj train`` trains one network by a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..training.recipe import load_recipe, recipe_names
from .errors import require_train_extra, user_errors
from .recipe_options import FLAGS, add_data_root, add_device, add_out, add_overrides, overrides


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj train``."""
    parser = commands.add_parser(
        "train",
        help="train a network as a paper did",
        description="Train a network by a recipe, which is one of those that come with the package or a TOML file. "
        "Every value of it can be overridden. The folder --out gets a checkpoint after every epoch, logs for "
        "TensorBoard and as CSV, and result.json. On several nodes: torchrun ... -m klif_sj train ...",
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--recipe", metavar="NAME", help="a recipe or a file *.toml")
    choice.add_argument("--list", action="store_true", help="list the recipes and end")
    add_overrides(parser, FLAGS)
    add_data_root(parser)
    add_device(parser, processes=True)
    add_out(parser, "training", "klif-sj-train/RECIPE-NEURON")
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> None:
    """Train, and print the accuracy beside the published one."""
    if options.list:
        _print_recipes()
        return
    require_train_extra()
    from rich.console import Console

    from ..inspection.tables import counted
    from ..training.divergence import DivergenceError
    from ..training.inspected import inspect_checkpoint
    from ..training.run import TrainingRun, is_first_process

    console = Console(quiet=not is_first_process())
    with user_errors():
        recipe = load_recipe(options.recipe).override(**overrides(options))
        run = TrainingRun(
            recipe,
            options.out or Path("klif-sj-train", f"{recipe.name}-{recipe.neuron}"),
            data_root=options.data_root,
            devices=options.devices,
            accelerator=options.accelerator,
            resume=options.resume,
            command=options.command,
        )
    with user_errors(DivergenceError, OSError):
        result = run.run(console)
    if recipe.validation:
        accuracy = f"Validation accuracy after {recipe.epochs} epochs: {100 * result['validation_accuracy']:.2f} %"
    else:
        published = f"; published: {recipe.published_accuracy:g} %" if recipe.published_accuracy else ""
        accuracy = f"Test accuracy after {recipe.epochs} epochs: {100 * result['test_accuracy']:.2f} %{published}"
    console.print(accuracy)
    console.print(f"Result: {run.result}")
    if is_first_process():
        inspection = inspect_checkpoint(run.checkpoint, options.data_root, accelerator=options.accelerator)
        findings = counted(len(inspection.findings), "finding")
        console.print(f"What its layers do ({findings}): {inspection.save(run.out)}")


def _print_recipes() -> None:
    table = [("recipe", "network", "data set", "T", "epochs", "published for, %")]
    for recipe in map(load_recipe, recipe_names()):
        figures = (
            f"{neuron} {', '.join(f'{accuracy:g} (T = {t})' for t, accuracy in by_time_steps.items())}"
            for neuron, by_time_steps in recipe.published.items()
        )
        row = (recipe.network, recipe.dataset, str(recipe.time_steps), str(recipe.epochs), "; ".join(figures))
        table.append((recipe.name, *row))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
