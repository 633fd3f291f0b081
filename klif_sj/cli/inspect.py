"""``klif-sj inspect`` shows what the spiking layers of a trained network do, and why it does not learn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..inspection import Thresholds
from .errors import require_train_extra, user_errors
from .recipe_options import add_data_root, add_device, parse_setting

if TYPE_CHECKING:
    from ..inspection import Inspection


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj inspect``."""
    parser = commands.add_parser(
        "inspect",
        help="show what the spiking layers of a checkpoint do, and why it does not learn",
        description="Run checkpoints of klif-sj train on the test set of their recipes, or on the validation samples "
        "where a recipe puts some aside, and show of each spiking layer: firing rates, potentials against the "
        "threshold, surrogate coverage, gradients over time, learned parameters; and findings: what is wrong, what it "
        "means and what usually helps. Several are put side by side. The folder --out gets inspection.html and "
        "inspection.json.",
    )
    add = parser.add_argument
    add(
        "what",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="such as klif-sj-train/digits-klif/checkpoints/last.ckpt; or an inspection.json, or a folder that has one",
    )
    add_data_root(parser)
    add("--batch-size", type=int, metavar="N", help="default: the recipe's")
    add_device(parser)
    add(
        "--inputs",
        type=int,
        default=1000,
        metavar="N",
        help="from the first on, rounded up to whole batches (default: 1000)",
    )
    add(
        "--sampled-potentials",
        type=int,
        default=100_000,
        metavar="N",
        help="of each layer, at most; in whole inputs of the first batch (default: 100000)",
    )
    add(
        "--counted-inputs",
        type=int,
        default=1,
        metavar="N",
        help="count operations on the first N inputs of the first batch; 0 counts none (default: 1)",
    )
    add(
        "--threshold",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="from where on something is a finding, such as coverage=0.02; may be given repeatedly",
    )
    add("--out", type=Path, default=Path("klif-sj-inspect"), metavar="DIR", help="default: klif-sj-inspect")
    parser.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> None:
    """Inspect, print the table and the findings, and say where the page is."""
    require_train_extra()
    from rich.console import Console

    from ..inspection.result import load_all, save_side_by_side
    from ..inspection.tables import print_inspections
    from ..training.inspected import inspect_checkpoint

    with user_errors():
        thresholds = _thresholds(options.threshold)
        inspections: list[Inspection] = []
        for path in options.what:
            if path.is_dir() or path.suffix == ".json":
                inspections += load_all(path)
                continue
            inspections.append(
                inspect_checkpoint(
                    path,
                    options.data_root,
                    inputs=options.inputs,
                    batch_size=options.batch_size,
                    accelerator=options.accelerator,
                    thresholds=thresholds,
                    sampled_potentials=options.sampled_potentials,
                    counted_inputs=options.counted_inputs,
                )
            )
        inspections = distinguished(inspections, [str(path) for path in options.what])
        page = save_side_by_side(inspections, options.out)
    console = Console()
    print_inspections(inspections, console)
    console.print(f"Page: {page}")


def _thresholds(settings: Sequence[str]) -> Thresholds:
    try:
        return Thresholds(**dict(parse_setting("--threshold", text, "coverage=0.02") for text in settings))
    except TypeError as error:
        known = ", ".join(Thresholds.__dataclass_fields__)
        raise ValueError(f"--threshold: expected NAME=NUMBER with one of {known} ({error})") from error


def distinguished(inspections: list[Inspection], others: Sequence[str]) -> list[Inspection]:
    """The inspections with titles that differ: their own titles, or the ``others`` if two of their own are the same."""
    if len({inspection.title for inspection in inspections}) == len(inspections) or len(others) != len(inspections):
        return inspections
    return [replace(inspection, title=title) for inspection, title in zip(inspections, others, strict=True)]
