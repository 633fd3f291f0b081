"""``klif-sj evaluate`` shows what a trained network does on the test set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import require_train_extra, user_errors
from .recipe_options import add_data_root, add_device

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.evaluate import Evaluation, Operations


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj evaluate``."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a checkpoint: accuracy by time step, firing rates, operations, energy",
        description="Evaluate a checkpoint of klif-sj train on the test set of its recipe: accuracy when the output is "
        "read after each time step, firing rate by layer, and, with SpikingJelly 2, synaptic operations and an "
        "estimate of their energy.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="such as klif-sj-train/digits-klif/checkpoints/last.ckpt")
    add_data_root(parser)
    add("--batch-size", type=int, metavar="N", help="default: the recipe's")
    add_device(parser)
    add(
        "--counted-inputs",
        type=int,
        default=256,
        metavar="N",
        help="count operations on the first N inputs, rounded up to whole batches; 0 counts none (default: 256)",
    )
    add("--json", type=Path, metavar="FILE", help="write all of it to a file as well")
    parser.set_defaults(run=evaluate_checkpoint)


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    """Evaluate, and print the tables."""
    require_train_extra()
    from rich.console import Console

    from ..training.atomic import write_json
    from ..training.evaluate import NO_COUNTERS, evaluate
    from ..training.run import Placement, data_of, load_checkpoint

    with user_errors(ValueError, OSError):
        if options.counted_inputs < 0:
            raise ValueError(f"counted_inputs: expected at least 0, got {options.counted_inputs}")
        recipe, net = load_checkpoint(options.checkpoint)
        device = Placement.find(options.accelerator, 1).device
        data = data_of(recipe.override(validation=0), options.data_root, options.batch_size)
    evaluation = evaluate(net.to(device), data.test_dataloader(), options.counted_inputs)
    console = Console()
    console.print(f"{recipe.name}, neuron {recipe.neuron}, T = {recipe.time_steps}: {net.notation}")
    console.print(f"Test accuracy on {evaluation.inputs} inputs: {100 * evaluation.accuracy:.2f} %\n")
    _print_evaluation(evaluation, console)
    if evaluation.operations is not None:
        _print_operations(evaluation.operations, console)
    elif options.counted_inputs:
        console.print(NO_COUNTERS)
    if options.json:
        report = {"checkpoint": str(options.checkpoint), "recipe": recipe.as_dict(), **evaluation.as_dict()}
        with user_errors(OSError):
            write_json(options.json, report)


def _print_evaluation(evaluation: Evaluation, console: Console) -> None:
    from rich.table import Table

    steps = Table("read after step", "test accuracy, %")
    for step, accuracy in enumerate(evaluation.accuracy_by_step, start=1):
        steps.add_row(str(step), f"{100 * accuracy:.2f}")
    layers = Table("spiking layer", "firing rate")
    for layer, rate in evaluation.firing_rate.items():
        layers.add_row(layer, f"{rate:.4f}")
    console.print(steps, layers)


def _print_operations(operations: Operations, console: Console) -> None:
    from rich.table import Table

    synapses = Table("synapses", "synaptic operations")
    for layer, count in operations.synaptic_operations_by_layer.items():
        synapses.add_row(layer, f"{count:,.0f}")
    synapses.add_section()
    synapses.add_row("all", f"{operations.synaptic_operations:,.0f}")
    costs = Table("one input", "")
    costs.add_row("multiply-accumulations", f"{operations.multiply_accumulations:,.0f}")
    costs.add_row("accumulations", f"{operations.accumulations:,.0f}")
    costs.add_row("energy of these, µJ", f"{1e6 * operations.compute_energy:.4g}")
    costs.add_row("energy of memory access, µJ", f"{1e6 * operations.memory_energy:.4g}")
    console.print(synapses, costs)
    console.print(
        f"Means over {operations.inputs} inputs. Energy is SpikingJelly's estimate for a 45 nm process and float32: "
        "4.6 pJ a multiply-accumulation, 0.9 pJ an accumulation, 24.96 pJ a byte of weights and neuron states. "
        "The neurons' own operations and batch normalisation are left out."
    )
