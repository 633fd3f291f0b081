"""Measure how long a call takes on the CPU or the GPU, how much memory it takes, and how fast memory is copied."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .workload import PASSES, Workload

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """The median and the quartiles in seconds, and the number of samples."""

    median: float
    quartile1: float
    quartile3: float
    runs: int
    samples: tuple[float, ...] = ()

    def beyond(self, other: Timing, parts: int) -> Timing:
        """The time that each of the ``parts`` adds to the other timing."""
        own = (self.median, self.quartile1, self.quartile3)
        median, quartile1, quartile3 = ((value - other.median) / parts for value in own)
        return Timing(median, quartile1, quartile3, self.runs)

    def columns(self) -> dict[str, Any]:
        return {
            "median_us": self.median * 1e6,
            "quartile1_us": self.quartile1 * 1e6,
            "quartile3_us": self.quartile3 * 1e6,
            "runs": self.runs,
        }


def of_samples(seconds: list[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1, tuple(seconds))
    quartile1, median, quartile3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, quartile1, quartile3, len(seconds), tuple(seconds))


def together(timings: list[Timing | str]) -> Timing | str:
    """The timing of all samples together or, if a measurement has failed, the text of the first failure."""
    failures = [found for found in timings if isinstance(found, str)]
    if failures:
        return failures[0]
    return of_samples([second for found in timings if isinstance(found, Timing) for second in found.samples])


def on_cpu(call: Call, threads: int, min_seconds: float) -> Timing:
    """Time a call by torch.utils.benchmark, for at least ``min_seconds`` and with at least five samples."""
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    seconds: list[float] = []
    while len(seconds) < 5:
        seconds += timer.blocked_autorange(min_run_time=min_seconds).times
    return of_samples(seconds)


def on_gpu(call: Call, min_seconds: float) -> Timing:
    """Time a call by CUDA events. The L2 cache is cleared before every call."""
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=25, rep=1000 * min_seconds, return_mode="all")
    return of_samples([value / 1e3 for value in milliseconds])


def on_gpu_replayed(call: Call, min_seconds: float) -> Timing:
    """Time the replay of a call as a CUDA graph, which leaves out the time that the host takes to launch it."""
    from triton.testing import do_bench_cudagraph

    milliseconds = do_bench_cudagraph(call, rep=max(100 * min_seconds, 2), return_mode="all")
    return of_samples([value / 1e3 for value in milliseconds])


def by_the_clock(call: Call, device: str, calls: int, samples: int, wait: bool) -> Timing:
    """Wall time of a call, from samples of several calls in a row.

    On a GPU, calls only queue work. With ``wait`` a sample ends when all of its work is done, which gives the
    throughput. Without ``wait`` it ends when the host can go on.
    """
    call()
    seconds = []
    for _ in range(samples):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if wait:
            synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    synchronize(device)
    return of_samples(seconds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Passes:
    """The three passes of a module, as calls without arguments that use the inputs in turn."""

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Tensor], inputs: list[tuple[Tensor, Tensor]]) -> None:
        self._run = run
        self._inputs = inputs
        self._learned = [p for p in module.parameters() if p.requires_grad]
        self._in_turn = itertools.cycle(inputs)
        self._forwards: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())

    def call(self, of_pass: str) -> Call:
        if of_pass == "backward":
            self._forwards = itertools.cycle([(self._run(x), x, grad) for x, grad in self._inputs])
        else:
            self._forwards = iter(())
        return {"forward": self.forward, "backward": self.backward, "both": self.both}[of_pass]

    def forward(self) -> Tensor:
        x, _ = next(self._in_turn)
        return self._run(x)

    def backward(self) -> tuple[Tensor, ...]:
        spikes, x, grad = next(self._forwards)
        return torch.autograd.grad(spikes, [x, *self._learned], grad, retain_graph=True, allow_unused=True)

    def both(self) -> tuple[Tensor, ...]:
        x, grad = next(self._in_turn)
        return torch.autograd.grad(self._run(x), [x, *self._learned], grad, allow_unused=True)


def copy_call(workload: Workload, of_pass: str) -> Call:
    """A copy that moves as many bytes as the pass has to. Its time is the limit at this size."""
    elements = (1 << workload.log2_size) * PASSES[of_pass] // 2
    sets = [
        tuple(torch.zeros(elements, dtype=workload.torch_dtype, device=workload.device) for _ in range(2))
        for _ in range(workload.input_sets())
    ]
    in_turn = itertools.cycle(sets)

    def copy() -> None:
        source, target = next(in_turn)
        target.copy_(source)

    return copy


def copy_bandwidth(device: str, threads: int) -> float:
    """The bytes that a large copy reads and writes per second."""
    elements = 1 << (28 if device == "cuda" else 26)
    source, target = (torch.ones(elements, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(source)

    timing = on_gpu(copy, 0.2) if device == "cuda" else on_cpu(copy, threads, 0.5)
    return 2 * source.nbytes / timing.median


def saved_bytes(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """How many bytes a forward keeps for its backward, without parameters. Memory that tensors share counts once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        spikes = run(x)
    total = sum(storage.nbytes() for storage in kept.values())
    del spikes
    return total


def peak_bytes(call: Call, device: str) -> int:
    """The most memory that a call holds at one time, without what was held before it."""
    call()
    if device == "cpu":
        from klif_sj.training.step_cost import peak_on_cpu

        return peak_on_cpu(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
