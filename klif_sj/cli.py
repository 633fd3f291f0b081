"""klif-sj: the command line. A sub-command is one function of :data:`COMMANDS`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__
from .coding import make_neuron
from .models import NEURONS, neuron_factory
from .neuron import FusedNode
from .runtime.environment import environment
from .swap.script import add_run
from .training.command import add_train
from .training.evaluate_command import add_evaluate
from .training.reproduce_command import add_reproduce
from .training.settings import RECIPES, WIDTHS, Settings
from .usage import UserError, require_train_extra

__all__ = ["main"]

SOURCE_DTYPES = ("float16", "bfloat16", "float32", "float64")

USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``klif-sj`` with these arguments, or the process's own; returns the exit status."""
    parser = argparse.ArgumentParser(prog="klif-sj", description="Published spiking neurons for SpikingJelly.")
    parser.add_argument("--version", action="version", version=f"klif_sj {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["klif-sj", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.run(options)
    except UserError as error:
        print(f"klif-sj: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if getattr(options, "passes_interrupts", False):
            raise
        print("klif-sj: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``klif-sj compare``: the same network with several neurons."""
    parser = commands.add_parser(
        "compare",
        help="train the same network with several neurons and show what the swap brings",
        description="Train the same network with several neurons, from the same initial weights and in the same order "
        "of the data, and compare accuracy, firing rates, k, time and memory. Unless told otherwise, digits run in "
        "about a minute, and MNIST and Fashion-MNIST by the KLIF paper's recipe at full size, which asks for a GPU.",
    )
    add = parser.add_argument
    add("--dataset", default="digits", metavar="NAME", help=f"{', '.join(RECIPES)} (default: digits)")
    add(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of MNIST/ and FashionMNIST/ (default: data)",
    )
    add("--neurons", default="lif,klif", metavar="NAMES", help=f"of {', '.join(NEURONS)} (default: lif,klif)")
    add("--epochs", type=int, metavar="N", help="default: the data set's recipe, here and below")
    add("--time-steps", type=int, metavar="T", help="how often an image is shown")
    add("--width", type=_width, metavar="W", help=f"{', '.join(WIDTHS)}, or a factor on the paper's layer sizes")
    add("--batch-size", type=int, metavar="N")
    add("--learning-rate", type=float, metavar="RATE", help="Adam's, at the start")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--backend", default="auto", metavar="NAME", help="of our neurons: auto, torch, cpp or cupy (default: auto)")
    add("--seed", type=int, default=0, metavar="N")
    add("--out", type=Path, default=Path("klif-sj-compare"), metavar="DIR", help="default: klif-sj-compare")
    add("--resume", action="store_true", help="go on with the comparison that was interrupted in --out")
    parser.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> None:
    """Compare neurons, print the table, and say where the report is."""
    require_train_extra()
    from rich.console import Console

    from .training.compare import Comparison
    from .training.report import terminal_table

    # On a machine without a GPU, the profiler of a PyTorch that was built for CUDA complains on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    console = Console()
    try:
        settings = Settings.for_dataset(
            options.dataset,
            neurons=tuple(name for name in options.neurons.split(",") if name.strip()),
            epochs=options.epochs,
            time_steps=options.time_steps,
            width=options.width,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            threads=options.threads,
            seed=options.seed,
            backend=options.backend,
            device=options.device,
            data_root=options.data_root,
        )
        comparison = Comparison(settings, options.out, resume=options.resume, command=options.command)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(error) from error
    try:
        report = comparison.run(console)
    except KeyboardInterrupt:
        print("\nThe epochs that were finished are saved; the same command with --resume goes on.", file=sys.stderr)
        raise
    console.print(terminal_table(report))
    console.print(f"Report and pictures: {options.out / 'report.md'}")


def add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``klif-sj info``: the environment report."""
    parser = commands.add_parser("info", help="print the environment report that a bug report needs")
    parser.set_defaults(run=info)


def info(options: argparse.Namespace) -> None:
    """Print versions, hardware, and which backends can serve or why not."""
    report = environment()
    width = max(map(len, report))
    for label, text in report.items():
        print(f"{label:{width}}  {text}")


def add_source(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``klif-sj source``: the CUDA that is generated from a neuron's equations."""
    parser = commands.add_parser(
        "source",
        help="print the CUDA kernel that is generated from a neuron's equations",
        description="Print the CUDA C++ of a neuron's kernels, forward and backward, as generated from its equations.",
    )
    add = parser.add_argument
    add("neuron", metavar="NEURON", help=f"one of {', '.join(name for name in NEURONS if name != 'lif')}")
    add("--T", type=int, default=4, metavar="T", help="time steps (default: 4)")
    add("--dtype", default="float32", choices=SOURCE_DTYPES, help="of the input and the spikes (default: float32)")
    add("--channels", type=int, default=1, metavar="C", help="for neurons with parameters by channel (default: 1)")
    parser.set_defaults(run=source)


def source(options: argparse.Namespace) -> None:
    """Print the source of a neuron's kernels."""
    try:
        node = make_neuron(neuron_factory(options.neuron, options.T), options.channels)
        if not isinstance(node, FusedNode):
            raise ValueError(f"neuron: {options.neuron!r} is SpikingJelly's own, which has no generated kernel")
        print(node.cuda_source(options.T, getattr(torch, options.dtype)))
    except ValueError as error:
        raise UserError(error) from error


COMMANDS = (add_compare, add_evaluate, add_info, add_reproduce, add_run, add_source, add_train)


def _width(text: str) -> float:
    if text in WIDTHS:
        return WIDTHS[text]
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {', '.join(WIDTHS)} or a number, got {text!r}") from None
