"""The suites: which workloads are measured, how, and in what order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from .neurons import FUSED
from .workload import Workload

SUITES = ("kernels", "overhead", "memory", "training", "cpu")

MAIN = ("klif", "clif", "glif-channel")
OTHERS = ("lif", "user", "glif-layer")
ALL_PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Training:
    """A workload of whole training steps of a network: forward, backward and optimizer."""

    network: str
    neuron: str
    steps: int
    batch: int
    precision: str = "float32"
    layout: str = "contiguous"
    device: str = "cuda"
    threads: int = 1
    width: float = 1.0

    @property
    def name(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        network = self.network if self.width == 1.0 else f"{self.network} x {self.width}"
        return f"{network}, {self.neuron}, T {self.steps}, batch {self.batch}, {self.precision}, {self.layout}, {where}"

    def columns(self) -> dict[str, Any]:
        return {
            "workload": self.name,
            "neuron": self.neuron,
            "T": self.steps,
            "batch": self.batch,
            "dtype": self.precision,
            "layout": self.layout,
            "device": self.device,
            "threads": self.threads if self.device == "cpu" else None,
        }


@dataclass(frozen=True)
class Job:
    """A layer's workload and what is measured of it: ``time``, ``host``, ``first call`` or ``memory``.

    ``tier`` is its priority. Lower numbers are measured first, and the targets are about tier 0.
    """

    suite: str
    tier: int
    workload: Workload
    measure: str = "time"
    passes: tuple[str, ...] = ("both",)
    compiled: bool = True
    """Whether providers that use torch.compile take part. Each of them compiles for up to minutes."""


@dataclass(frozen=True)
class TrainingJob:
    """A training whose steps are measured."""

    measure: ClassVar[str] = "training"
    passes: ClassVar[tuple[str, ...]] = ("step",)
    suite: str
    tier: int
    workload: Training
    compiled: bool = True


def jobs(suites: tuple[str, ...], device: str, quick: bool) -> list[Job | TrainingJob]:
    """The jobs of the suites, the most important ones first. The suite ``cpu`` measures the CPU for any ``device``."""
    makers: dict[str, Callable[[str, bool], Iterator[Job | TrainingJob]]] = {
        "kernels": kernels, "overhead": overhead, "memory": memory, "training": training, "cpu": cpu
    }  # fmt: skip
    found = [job for suite in suites for job in makers[suite](device, quick)]
    return sorted(dict.fromkeys(found), key=lambda job: job.tier)


def kernels(device: str, quick: bool) -> Iterator[Job]:
    """The layers on a GPU. The suite ``cpu`` has those on a CPU."""
    if device != "cuda":
        return

    def job(
        tier: int, neuron: str, steps: int, size: int, *, dtype: str = "float32", layout: str = "contiguous",
        passes: tuple[str, ...] = ALL_PASSES, compiled: bool = True,
    ) -> Job:  # fmt: skip
        return Job("kernels", tier, Workload(neuron, steps, size, dtype, layout, "cuda"), "time", passes, compiled)

    large = 22 if quick else 26
    for neuron in MAIN:
        for steps in (4, 8, 16):
            yield job(0, neuron, steps, large, compiled=False)
        yield job(0, neuron, 4, large, dtype="float16", compiled=False)
        yield job(1, neuron, 4, large)
    if quick:
        return
    for neuron in MAIN:
        for steps in (8, 16):
            yield job(1, neuron, steps, large, dtype="float16", compiled=False)
        for steps in (4, 8, 16):
            yield job(1, neuron, steps, large, dtype="bfloat16", compiled=False)
        for dtype in ("float32", "float16"):
            yield job(1, neuron, 8, large, dtype=dtype, layout="channels_last", compiled=False)
        for size in range(12, 28, 2):
            yield job(1, neuron, 4, size, passes=("both",), compiled=False)
        for steps in (1, 2, 32, 128):
            yield job(1, neuron, steps, 24, passes=("both",), compiled=False)
        yield job(2, neuron, 4, 27, compiled=False)
        yield job(2, neuron, 4, 12, passes=("both",))
        for steps in (8, 16):
            yield job(2, neuron, steps, large)
        yield job(2, neuron, 4, large, dtype="float16")
        yield job(3, neuron, 32, 24, passes=("both",))
    for neuron in OTHERS:
        for dtype in ("float32", "float16"):
            yield job(2, neuron, 4, large, dtype=dtype, compiled=False)
        yield job(3, neuron, 4, large)
    for neuron in FUSED:
        yield job(2, neuron, 8, large, compiled=False)
        yield job(3, neuron, 8, large)


def cpu(device: str, quick: bool) -> Iterator[Job]:
    """The same on one thread and on two."""
    cores = os.cpu_count() or 1
    large, middle = (18, 16) if quick else (23, 20)
    for threads in sorted({1, min(2, cores)}):
        for neuron in MAIN:
            compiled = not quick or (neuron == "klif" and threads == 1)
            yield Job("cpu", 0, Workload(neuron, 8, large, threads=threads), "time", ALL_PASSES, compiled)
        if quick and threads < min(2, cores):
            continue
        for neuron in MAIN[:1] if quick else MAIN:
            for size in range(12, large, 2):
                yield Job("cpu", 1, Workload(neuron, 4, size, threads=threads), compiled=False)
            for steps in (1, 2, 8, 32) if quick else (1, 2, 4, 8, 16, 32, 128):
                yield Job("cpu", 1, Workload(neuron, steps, middle, threads=threads), compiled=False)
    for neuron in MAIN:
        for dtype in ("float16", "bfloat16"):
            yield Job("cpu", 2, Workload(neuron, 8, middle, dtype), compiled=False)
        yield Job("cpu", 2, Workload(neuron, 8, middle, layout="channels_last"), compiled=False)
    for neuron in OTHERS:
        yield Job("cpu", 2, Workload(neuron, 8, middle), "time", ALL_PASSES, compiled=False)
    for threads, size in ({1: middle} | {min(2, cores): large}).items():
        for neuron in FUSED:
            yield Job("cpu", 2, Workload(neuron, 8, size, threads=threads), "time", ALL_PASSES, compiled=not quick)


def overhead(device: str, quick: bool) -> Iterator[Job]:
    """The cost of a call that has almost nothing to compute, and of the first call in a process."""
    for neuron in MAIN:
        tiny = Workload(neuron, 4, 8, device=device)
        yield Job("overhead", 0, tiny, "host", ("forward", "both"), compiled=not quick)
        if neuron == "klif" or not quick:
            yield Job("overhead", 0 if neuron == "klif" else 1, tiny, "first call", compiled=not quick)
        if device == "cuda":
            yield Job("overhead", 1, tiny, "time", ("both",), compiled=not quick)


def memory(device: str, quick: bool) -> Iterator[Job]:
    """The memory that a layer keeps for its backward, and the most memory that a training step of it takes."""
    size = 18 if quick else 26 if device == "cuda" else 22
    for neuron in MAIN:
        for steps in (4, 8) if quick else (4, 8, 16, 32):
            yield Job(
                "memory", 1, Workload(neuron, steps, size, device=device), "memory", compiled=not quick and steps == 4
            )


def training(device: str, quick: bool) -> Iterator[TrainingJob]:
    """The training of networks for images of the shapes of CIFAR and Fashion-MNIST."""

    def job(
        tier: int, network: str, neuron: str, steps: int, batch: int, precision: str = "float32",
        layout: str = "contiguous", *, width: float = 1.0, compiled: bool = True,
    ) -> TrainingJob:  # fmt: skip
        task = Training(network, neuron, steps, batch, precision, layout, device, width=width)
        return TrainingJob("training", tier, task, compiled)

    if device == "cpu":
        for neuron in ("klif",) if quick else ("klif", "clif", "glif-layer"):
            yield job(1, "fashion-mnist", neuron, 4, 4 if quick else 16, width=0.125, compiled=False)
        return
    networks = ("fashion-mnist",) if quick else ("fashion-mnist", "resnet18", "sew-resnet18", "vgg16")
    for network in networks:
        for precision in ("amp", "float32"):
            yield job(1, network, "klif", 4, 128, precision, compiled=False)
        yield job(2, network, "klif", 4, 128, "amp")
    if quick:
        return
    for network in networks:
        yield job(2, network, "klif", 4, 16, "amp", compiled=False)
        yield job(2, network, "klif", 8, 128, "amp", compiled=False)
        yield job(2, network, "klif", 4, 128, "amp", "channels_last", compiled=False)
        yield job(3, network, "klif", 4, 16, "amp")
        for neuron in ("clif", "glif-layer"):
            yield job(3, network, neuron, 4, 128, "amp", compiled=False)
