"""``klif-sj reproduce`` runs rows of the KLIF paper's tables, or neurons by a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..training.recipe import load_recipe
from ..training.reports.paper_tables import TABLES, Figure
from .errors import require_train_extra, user_errors
from .recipe_options import FLAGS, add_data_root, add_device, add_overrides, names, overrides, seeds


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj reproduce``."""
    parser = commands.add_parser(
        "reproduce",
        help="run a table of the KLIF paper, or rows of it, and put the results beside the published figures",
        description="Train what a table of the KLIF paper (arXiv 2302.09238) reports. The folder --out gets a JSON "
        "file for each run and a page with the paper's figures beside ours, accuracy curves, k and firing rates by "
        "layer. A run that is in --out already is not run again, and one that was interrupted goes on, so the same "
        "command may be given until all is done. What is run otherwise than in the paper is labelled so.",
    )
    add = parser.add_argument
    titles = "; ".join(f"{number}: {table.title}" for number, table in TABLES.items())
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--table", type=int, choices=TABLES, metavar="N", help=titles)
    choice.add_argument("--recipe", metavar="NAME", help="any neurons by one recipe of the package, in tables or not")
    add("--dataset", type=names, default=(), metavar="NAMES", help="default: all of the table's, here and below")
    add("--network", type=names, default=(), metavar="NAMES", help="vgg16 or resnet18, in Tables 3 and 5")
    add("--neurons", type=names, default=(), metavar="NAMES", help="such as lif,klif")
    add("--seeds", type=seeds, default=(0,), metavar="SEEDS", help="one run for each, such as 0,1,2 (default: 0)")
    add("--tuned", type=Path, metavar="FILE", help="take what klif-sj tune found best for each neuron")
    add_overrides(parser, (name for name in FLAGS if name not in ("neuron", "seed", "validation")))
    add_data_root(parser)
    add_device(parser, processes=True)
    add("--out", type=Path, default=Path("klif-sj-reproduce"), metavar="DIR", help="default: klif-sj-reproduce")
    parser.set_defaults(run=reproduce_table, when_interrupted="What was finished is saved; the same command goes on.")


def reproduce_table(options: argparse.Namespace) -> None:
    """Run what is missing, and say where the page is."""
    require_train_extra()
    from rich.console import Console

    from ..training.divergence import DivergenceError
    from ..training.reports.reproduction import plan, reproduce
    from ..training.reports.tuning import Tuned
    from ..training.run import is_first_process

    console = Console(quiet=not is_first_process())
    with user_errors(ValueError, TypeError, OSError, DivergenceError):
        tuned = options.tuned and Tuned.read(options.tuned)
        reproduce(
            plan(_figures(options), options.seeds, tuned, **overrides(options)),
            options.out,
            console,
            tuned,
            data_root=options.data_root,
            devices=options.devices,
            accelerator=options.accelerator,
            command=options.command,
        )
    console.print(f"Page: {options.out / 'README.md'}")


def _figures(options: argparse.Namespace) -> list[Figure]:
    if options.table:
        return TABLES[options.table].select(datasets=options.dataset, networks=options.network, neurons=options.neurons)
    if options.dataset or options.network:
        raise ValueError("--dataset and --network choose from a table; a recipe has one of each")
    name = load_recipe(options.recipe).name
    return [Figure(neuron, name, neuron) for neuron in options.neurons or ("lif", "klif")]
