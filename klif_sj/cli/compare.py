"""``klif-sj compare`` trains the same network with several neurons."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .._checks import nearest
from ..models.neurons import NEURONS
from ..training.recipe import load_recipe
from .errors import require_train_extra, user_errors
from .recipe_options import add_data_root, add_device, add_out, add_overrides, names, overrides, seeds

RECIPES = {"digits": "digits", "mnist": "klif-mnist", "fashion-mnist": "klif-fashion-mnist"}
"""The recipe of a comparison on each data set."""

FIELDS = ("epochs", "time_steps", "width", "batch_size", "learning_rate", "threads", "backend")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj compare``."""
    parser = commands.add_parser(
        "compare",
        help="train the same network with several neurons and show what the swap brings",
        description="Train the same network with several neurons and seeds, for each seed from the same initial "
        "weights and in the same order of the data, and compare accuracy, firing rates, k, time and memory. Unless "
        "told otherwise, digits run in about a minute, and MNIST and Fashion-MNIST by the KLIF paper's recipe at full "
        "size, which asks for a GPU.",
    )
    parser.add_argument("--dataset", default="digits", metavar="NAME", help=f"{', '.join(RECIPES)} (default: digits)")
    parser.add_argument(
        "--neurons",
        type=names,
        default=("lif", "klif"),
        metavar="NAMES",
        help=f"of {', '.join(NEURONS)} (default: lif,klif)",
    )
    parser.add_argument(
        "--seeds",
        "--seed",
        type=seeds,
        default=(0, 1, 2),
        metavar="SEEDS",
        help="each trains every neuron once (default: 0,1,2)",
    )
    add_overrides(parser, FIELDS)
    add_data_root(parser)
    add_device(parser)
    add_out(parser, "comparison", "klif-sj-compare")
    parser.set_defaults(run=compare, out=Path("klif-sj-compare"))


def compare(options: argparse.Namespace) -> None:
    """Compare neurons, print the table, and say where the report is."""
    require_train_extra()
    from rich.console import Console
    from rich.markdown import Markdown

    from ..inspection.result import save_side_by_side
    from ..training.divergence import DivergenceError
    from ..training.inspected import inspect_checkpoint
    from ..training.reports.comparison import Comparison, results_table

    # On a machine without a GPU, the profiler of a PyTorch that was built for CUDA complains on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    console = Console()
    with user_errors():
        if options.dataset not in RECIPES:
            raise ValueError(
                f"dataset: expected one of {', '.join(RECIPES)}, got {options.dataset!r}"
                f"{nearest(options.dataset, RECIPES)}"
            )
        comparison = Comparison(
            load_recipe(RECIPES[options.dataset]).override(**overrides(options)),
            options.neurons,
            options.seeds,
            options.out,
            data_root=options.data_root,
            accelerator=options.accelerator,
            resume=options.resume,
            command=options.command,
        )
    with user_errors(DivergenceError, OSError):
        report = comparison.run(console)
    console.print(Markdown(results_table(report)), report["conclusion"], sep="\n")
    console.print(f"Report and pictures: {options.out / 'report.md'}")
    inspections = [
        inspect_checkpoint(run.checkpoint, options.data_root, accelerator=options.accelerator, title=name)
        for (name, seed), run in comparison.runs.items()
        if seed == report["seeds"][0]
    ]
    page = save_side_by_side(inspections, options.out)
    console.print(f"What the layers do with each neuron, seed {report['seeds'][0]}: {page}")
