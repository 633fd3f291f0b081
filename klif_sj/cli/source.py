"""klif-sj source: the CUDA that is generated from a neuron's equations."""

from __future__ import annotations

import argparse

import torch

from ..coding import make_neuron
from ..models.neurons import NEURONS, neuron_factory
from ..neuron import FusedNode
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
    add("neuron", metavar="NEURON", help=f"one of {', '.join(name for name in NEURONS if name != 'lif')}")
    add("--T", type=int, default=4, metavar="T", help="time steps (default: 4)")
    add("--dtype", default="float32", choices=DTYPES, help="of the input and the spikes (default: float32)")
    add("--channels", type=int, default=1, metavar="C", help="for neurons with parameters by channel (default: 1)")
    parser.set_defaults(run=source)


def source(options: argparse.Namespace) -> None:
    """Print the source of a neuron's kernels."""
    with user_errors(ValueError):
        node = make_neuron(neuron_factory(options.neuron, options.T), options.channels)
        if not isinstance(node, FusedNode):
            raise ValueError(f"neuron: {options.neuron!r} is SpikingJelly's own, which has no generated kernel")
        print(node.cuda_source(options.T, getattr(torch, options.dtype)))
