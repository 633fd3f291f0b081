"""Check with every provider in turn whether its neuron layer is right, and measure what the layer costs."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import timing
from .correctness import Result, Verdict, judge, train
from .plan import Job
from .providers import Provider, prepare
from .rows import Row
from .workload import Workload

COPY = "copy"

FURTHER_LAYERS = 8

ROUNDS = 3

HOST_ROUNDS = 15
"""The fastest of these rounds counts, because other work on the machine lasts for seconds and only slows the host."""


def failure(error: Exception) -> str:
    """A row's status for an exception."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"failed: {type(error).__name__}: {first_line[:300]}"


def runner(provider: Provider, workload: Workload) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The provider's layer, and how to run it on a sequence from its initial state."""
    node = provider.node(workload.neuron, workload.steps, workload.shape[2], workload.device)
    module = prepare(provider, node, workload.threads)
    reset = getattr(node, "reset", None)
    if reset is None:
        return node, module

    def run(x: Tensor) -> Tensor:
        reset()
        return module(x)

    return node, run


@dataclass(frozen=True)
class Contender:
    """A provider's layer that has been found right, and the columns that all of its rows have in common."""

    provider: Provider
    node: nn.Module
    run: Callable[[Tensor], Tensor]
    about: Row


def measure(
    job: Job, providers: Iterable[Provider], expected: Result, bandwidth: float, min_seconds: float,
    deadline: float = float("inf"),
) -> Iterator[Row]:  # fmt: skip
    """The rows of the providers that there is time for. A layer that is refused or fails gets rows without times."""
    workload = job.workload
    torch.set_num_threads(workload.threads)
    contenders = []
    for provider in providers:
        if time.time() > deadline:
            break
        about = {"suite": job.suite, "provider": provider.name, "configuration": provider.configuration}
        about |= workload.columns()
        try:
            node, run = runner(provider, workload)
            verdict = judge(expected, train(node, run, *workload.inputs()), workload.dtype)
            about |= judged(verdict)
            if verdict.passed:
                contender = Contender(provider, node, run, about)
                if job.measure == "time":
                    contenders.append(contender)
                else:
                    yield from MEASURES[job.measure](job, contender)
                continue
        except Exception as error:  # a rival may fail in any way, and the others must still be measured
            about["status"] = failure(error)
        finally:
            free()
        yield from ({**about, "pass": of_pass, "launch": "eager"} for of_pass in job.passes)
    yield from time_in_turn(job, contenders, bandwidth, min_seconds)


def judged(verdict: Verdict) -> dict[str, Any]:
    return {
        "status": verdict.status,
        "error_spikes": verdict.error_spikes,
        "error_gradient": verdict.error_gradient,
        "firing_rate": verdict.firing_rate,
    }


def time_in_turn(job: Job, contenders: list[Contender], bandwidth: float, min_seconds: float) -> Iterator[Row]:
    """The rows with the times. On a CPU the contenders take several turns, so a slow minute affects all of them."""
    workload, rounds = job.workload, ROUNDS if job.workload.device == "cpu" else 1
    inputs = Inputs(workload)
    for of_pass in job.passes:
        found: dict[tuple[int, str], list[timing.Timing | str]] = defaultdict(list)
        for _ in range(rounds):
            for i, contender in enumerate(contenders):
                for launch, result in turn(workload, contender, inputs, of_pass, min_seconds / rounds):
                    found[i, launch].append(result)
                free()
        for (i, launch), results in found.items():
            yield timed(workload, of_pass, launch, timing.together(results), contenders[i].about, bandwidth)


def turn(
    workload: Workload, contender: Contender, inputs: Inputs, of_pass: str, min_seconds: float
) -> list[tuple[str, timing.Timing | str]]:
    """For each kind of launch, the time of a contender's pass or the reason why there is none."""
    try:
        passes = timing.Passes(contender.node, contender.run, inputs.suited_to(contender.run))
        return list(clocked(workload, of_pass, passes.call(of_pass), min_seconds, contender.provider.capturable))
    except Exception as error:
        return [("eager", failure(error))]


class Inputs:
    """Several inputs that are made once and used in turn. As in a network, each is the result of an operation."""

    def __init__(self, workload: Workload) -> None:
        made = (workload.inputs(seed) for seed in range(workload.input_sets()))
        self._sets = [(x.clone(), grad) for x, grad in made]

    def suited_to(self, run: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The inputs, each with a gradient in the dtype of the spikes that ``run`` returns."""
        dtype = run(self._sets[0][0]).dtype
        return [(x, grad.to(dtype)) for x, grad in self._sets]


def clocked(
    workload: Workload, of_pass: str, call: timing.Call, min_seconds: float, capturable: bool
) -> Iterator[tuple[str, timing.Timing | str]]:
    """The time of a call and, on a GPU, also of a replayed graph of the call if it can be captured."""
    if workload.device == "cpu":
        clocks = {"eager": lambda: timing.on_cpu(call, workload.threads, min_seconds)}
    else:
        clocks = {"eager": lambda: timing.on_gpu(call, min_seconds)}
        if capturable and of_pass != "backward":  # backward runs on the stream of its forward, which is not captured
            clocks["graph"] = lambda: timing.on_gpu_replayed(call, min_seconds)
    for launch, clock in clocks.items():
        try:
            yield launch, clock()
        except Exception as error:
            yield launch, failure(error)


def timed(
    workload: Workload, of_pass: str, launch: str, found: timing.Timing | str, about: Row, bandwidth: float
) -> Row:
    """The row with the time of a pass and the rate that follows from it, or with the reason why there is no time."""
    row = {**about, "pass": of_pass, "launch": launch}
    if isinstance(found, str):
        return row | {"status": found}
    rate = workload.floor_bytes(of_pass) / found.median
    return (
        row
        | found.columns()
        | {
            "floor_bytes": workload.floor_bytes(of_pass),
            "gb_per_s": rate / 1e9,
            "copy_gb_per_s": bandwidth / 1e9,
            "percent_of_copy": 100 * rate / bandwidth,
        }
    )


def measure_copy(job: Job, bandwidth: float, min_seconds: float) -> Iterator[Row]:
    """The rows of the limit at this size, which is a copy of as many bytes as each pass has to move."""
    workload = job.workload
    torch.set_num_threads(workload.threads)
    about = {"suite": job.suite, "provider": COPY, "status": "ok", "configuration": "Tensor.copy_ of the floor's bytes"}
    for of_pass in job.passes:
        call = timing.copy_call(workload, of_pass)
        for launch, found in clocked(workload, of_pass, call, min_seconds, True):
            yield timed(workload, of_pass, launch, found, about | workload.columns(), bandwidth)
        del call
        free()


def time_host(job: Job, contender: Contender) -> Iterator[Row]:
    """The host time of a single layer, and of each further layer behind it, without what a network pays once."""
    node, run, about = contender.node, contender.run, contender.about
    inputs = Inputs(job.workload).suited_to(run)

    layers = [(node, run)]
    if not contender.provider.compiled:  # torch.compile makes one call of a whole network
        layers += [runner(contender.provider, job.workload) for _ in range(FURTHER_LAYERS)]

    def run_all(x: Tensor) -> Tensor:
        for _, layer in layers:
            x = layer(x)
        return x

    network = nn.ModuleList(module for module, _ in layers)
    passes = [timing.Passes(node, run, inputs), timing.Passes(network, run_all, inputs)][: len(layers)]
    for of_pass in job.passes:
        calls = [measured.call(of_pass) for measured in passes]
        rounds = [
            [timing.by_the_clock(call, job.workload.device, calls=10, samples=10, wait=False) for call in calls]
            for _ in range(HOST_ROUNDS)
        ]
        one, *all_layers = (min(found, key=lambda of_round: of_round.median) for found in zip(*rounds, strict=True))
        yield {**about, "pass": of_pass, "launch": "host"} | one.columns()
        for found in all_layers:
            further = found.beyond(one, FURTHER_LAYERS)
            yield {**about, "pass": of_pass, "launch": "host, a further layer"} | further.columns()


def time_first_call(job: Job, contender: Contender) -> Iterator[Row]:
    """The time of the first training step in a new process, with empty caches and with those that such a step fills."""
    with tempfile.TemporaryDirectory() as caches:
        for launch in ("first, cold caches", "first, warm caches"):
            seconds = first_call(contender.provider, job.workload, Path(caches))
            found = timing.of_samples([seconds])
            yield {**contender.about, "pass": "both", "launch": launch} | found.columns()


def first_call(provider: Provider, workload: Workload, caches: Path) -> float:
    names = ("KLIF_SJ_CACHE", "CUPY_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    folders = {name: str(caches / name.lower()) for name in names}
    of_workload = (workload.neuron, workload.steps, workload.log2_size, workload.device)
    request = json.dumps([provider.process, provider.name, *of_workload])
    script = Path(__file__).with_name("first_call.py")
    environment = os.environ | folders
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled Python files are a cache too
    told = subprocess.run(
        [sys.executable, str(script), request], env=environment, capture_output=True, text=True, check=False
    )
    if told.returncode:
        raise RuntimeError((told.stderr.strip() or "no output").splitlines()[-1])
    return float(told.stdout.split()[-1])


def measure_memory(job: Job, contender: Contender) -> Iterator[Row]:
    workload, node, run = job.workload, contender.node, contender.run
    x, grad = workload.inputs()
    call = timing.Passes(node, run, [(x, grad.to(run(x).dtype))]).both
    yield {
        **contender.about,
        "pass": "both",
        "launch": "memory",
        "input_bytes": workload.sequence_bytes,
        "saved_bytes": timing.saved_bytes(node, run, x),
        "peak_bytes": timing.peak_bytes(call, workload.device),
    }


MEASURES = {"host": time_host, "first call": time_first_call, "memory": measure_memory}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
