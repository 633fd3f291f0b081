"""``klif-sj source`` prints the CUDA C++ that is generated from a neuron's equations."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import runtime
from ..coding import make_neuron
from ..models.neurons import NEURONS, neuron_factory
from ..neuron import FusedNode
from ..neuron.states import state_dtype
from .errors import user_errors

DTYPES = ("float16", "bfloat16", "float32", "float64")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj source``."""
    parser = commands.add_parser(
        "source",
        help="print the CUDA kernel that is generated from a neuron's equations",
        description="Print the CUDA C++ of a neuron's kernels, forward and backward, as generated from its equations.",
    )
    add = parser.add_argument
    add("neuron", metavar="NEURON", help=f"one of {', '.join(NEURONS)}")
    add("--T", type=int, default=4, metavar="T", help="time steps (default: 4)")
    add("--dtype", default="float32", choices=DTYPES, help="of the input and the spikes (default: float32)")
    add("--channels", type=int, default=1, metavar="C", help="for neurons with parameters by channel (default: 1)")
    parser.set_defaults(run=source)


def source(options: argparse.Namespace) -> None:
    """Print the source of a neuron's kernels."""
    with user_errors(ValueError):
        if options.T < 1:
            raise ValueError(f"T: expected a number of time steps, at least 1, got {options.T}")
        node: Any = make_neuron(neuron_factory(options.neuron, options.T), options.channels)
        dtype = getattr(torch, options.dtype)
        if isinstance(node, FusedNode):
            program = node.program(state_dtype(dtype))
        else:  # a neuron of SpikingJelly, which the factory has fused
            program = node._kernel_neuron_step(state_dtype(dtype))[0].program
        print(runtime.cuda_source(program, options.T, dtype))
