"""klif-sj reproduce: rows of the KLIF paper's tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..usage import UserError, require_train_extra
from .command import FLAGS, add_overrides, parse_setting
from .reproduce_tables import TABLES

__all__ = ["add_reproduce"]

OVERRIDES = tuple(name for name in FLAGS if name not in ("neuron", "seed"))


def add_reproduce(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``klif-sj reproduce``: a table of the KLIF paper, or some of it."""
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
    add("--table", type=int, choices=TABLES, required=True, metavar="N", help=titles)
    add("--dataset", type=_names, default=(), metavar="NAMES", help="default: all of the table's, here and below")
    add("--network", type=_names, default=(), metavar="NAMES", help="vgg16 or resnet18, in Tables 3 and 5")
    add("--neurons", type=_names, default=(), metavar="NAMES", help="such as lif,klif")
    add("--seeds", type=_seeds, default=(0,), metavar="SEEDS", help="one run for each, such as 0,1,2 (default: 0)")
    add_overrides(parser, OVERRIDES)
    add("--out", type=Path, default=Path("klif-sj-reproduce"), metavar="DIR", help="default: klif-sj-reproduce")
    parser.set_defaults(run=reproduce_table)


def reproduce_table(options: argparse.Namespace) -> None:
    """Run what is missing, and say where the page is."""
    require_train_extra()
    from rich.console import Console

    from .divergence import DivergenceError
    from .loop import is_first_process
    from .reproduce import plan, reproduce

    console = Console(quiet=not is_first_process())
    given = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    try:
        figures = TABLES[options.table].select(
            datasets=options.dataset, networks=options.network, neurons=options.neurons
        )
        reproduce(
            plan(figures, options.seeds, **dict(map(parse_setting, options.set)), **given),
            options.out,
            console,
            data_root=options.data_root,
            devices=options.devices,
            accelerator=options.accelerator,
            command=options.command,
        )
    except KeyboardInterrupt:
        print("\nWhat was finished is saved; the same command goes on.", file=sys.stderr)
        raise
    except (ValueError, TypeError, OSError, DivergenceError) as error:
        raise UserError(error) from error
    console.print(f"Page: {options.out / 'README.md'}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 0,1,2, got {text!r}") from None
