"""What an inspection costs beside the passes that it watches: ``python benchmarks/inspection.py``.

The passes are a forward pass of every batch from reset states, and a backward pass of the first batch. They are timed
in turn with the inspection. The least time of all rounds counts, because other work on the machine only adds time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

import klif_sj
from klif_sj.models import build_network, neuron_factory

ROUNDS = 7

Batches = list[tuple[Tensor, Tensor]]


def cases() -> Iterator[tuple[str, Callable[[], nn.Module], Callable[[], Batches]]]:
    """For each case a name, and functions that make the network and its batches."""

    def network(name: str, neuron: str, T: int, fused: bool = False, **options: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            torch.manual_seed(0)
            net = build_network(name, neuron_factory(neuron, T), T, classes=10, **options)
            if fused:
                klif_sj.fuse(net)
            return net.eval()

        return make

    def images(number: int, batch: int, channels: int, size: int) -> Callable[[], Batches]:
        return lambda: [
            (torch.rand(batch, channels, size, size), torch.randint(0, 10, (batch,))) for _ in range(number)
        ]

    digits: dict[str, Any] = {"in_channels": 1, "image_size": 8, "width": 0.25}
    small = images(23, 64, 1, 8)
    yield "digits, KLIF (cpp), 23 batches of 64", network("klif-mnist", "klif", 4, **digits), small
    yield "digits, LIF (SpikingJelly), 23 batches of 64", network("klif-mnist", "lif", 4, **digits), small
    yield "digits, LIF (fused), 23 batches of 64", network("klif-mnist", "lif", 4, True, **digits), small
    cifar: dict[str, Any] = {"in_channels": 3, "image_size": 32, "width": 0.25}
    large = images(4, 64, 3, 32)
    yield "VGG-16 of a quarter's width, KLIF (cpp), 4 batches of 64", network("vgg16", "klif", 4, **cifar), large
    yield "the same, LIF (SpikingJelly)", network("vgg16", "lif", 4, **cifar), large


def passes(net: nn.Module, batches: Batches) -> None:
    """Run the passes that an inspection watches."""
    for number, (x, labels) in enumerate(batches):
        functional.reset_net(net)
        if number:
            with torch.no_grad():
                net(x)
        else:
            torch.autograd.grad(F.cross_entropy(net(x), labels), list(net.parameters()), allow_unused=True)


def seconds(what: Callable[[], object]) -> float:
    """The processor time of one run. Other work on the machine changes it less than the wall time."""
    start = time.process_time()
    what()
    return time.process_time() - start


def measured() -> Iterator[tuple[str, float, float, float]]:
    """For each case: its name, the seconds of the passes, and how many times as long an inspection takes, with and
    without counting operations.
    """
    for name, make_net, make_batches in cases():
        net, batches = make_net(), make_batches()

        def alone(net: nn.Module = net, batches: Batches = batches) -> None:
            passes(net, batches)

        def whole(net: nn.Module = net, batches: Batches = batches) -> None:
            klif_sj.inspect(net, batches)

        def uncounted(net: nn.Module = net, batches: Batches = batches) -> None:
            klif_sj.inspect(net, batches, counted_inputs=0)

        runs = (alone, whole, uncounted)
        for run in runs:
            run()  # This builds the kernels.
        rounds = [[seconds(run) for run in runs] for _ in range(ROUNDS)]
        plain, counted, without = map(min, zip(*rounds, strict=True))
        yield name, plain, counted / plain, without / plain


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| network | the passes, s | with `inspect`, times | without counting operations |", "|---|---|---|---|"]
    lines += [f"| {name} | {plain:.3f} | {whole:.2f} | {without:.2f} |" for name, plain, whole, without in measured()]
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    lines += [
        "",
        f"Processor time of one thread, torch {torch.__version__}; the least of {ROUNDS} rounds in turn; "
        f"load {load:.1f} a core.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
