"""The first checks on a GPU: whether a kernel is right, also in a fresh thread, and how fast it is beside a copy.

``benchmarks/first.py`` runs each check in a process of its own: ``python -m bench.gpu_checks NAME [OUT]``.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.neurons import ours
from bench.workload import PASSES, Workload

LARGE = 26
"""The binary logarithm of the number of neuron-steps that are timed, which are far more than a cache holds."""

SUBNORMAL = 1e-40
"""A number that counts as 0 for a kernel that flushes subnormal numbers."""


def versions() -> None:
    """Print the versions of everything that matters on this machine."""
    from klif_sj._environment import environment
    from klif_sj.runtime import nvrtc

    for name, found in environment().items():
        print(f"{name}: {found}")
    try:
        known = ", ".join(map(str, nvrtc.binding().getSupportedArchs()))
        print(f"NVRTC {nvrtc.version()} compiles for {known}")
    except nvrtc.CompilerError as error:
        print(error)


def equals_torch(tau: float = 2.0, backend: str = "cupy", device: str = "cuda") -> None:
    """Compare KLIF, forward and backward, with eager torch on the same device. Some of its input is subnormal."""
    x = torch.randn(4, 64, 1000, device=device) * 2
    x[..., ::10] = SUBNORMAL
    found: list[list[Tensor]] = []
    for name in (backend, "torch"):
        node, leaf = ours("klif", name, 4, 1, keep_state=True).to(device), x.clone().requires_grad_()
        node.tau = tau
        spikes = node(leaf)
        gradients = torch.autograd.grad((spikes * x.cos()).sum() + node.v.square().sum(), [leaf, *node.parameters()])
        found.append([spikes, node.v, *gradients])
    for name, actual, expected in zip(("spikes", "v", "grad x", "grad k"), *found, strict=True):
        relative, absolute = (0.0, 0.0) if name in ("spikes", "v") else (1e-4, 1e-5)
        torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute, msg=partial(f"{name}: {{}}".format))
    v = found[0][1][..., ::10]
    if not ((v > 0) & (v < torch.finfo(v.dtype).tiny)).all():
        raise AssertionError(f"expected subnormal potentials, got {v.min()} to {v.max()}: they were flushed to 0")
    print(f"tau {tau}: spikes and potentials equal torch's bit for bit, {v.numel()} subnormal ones too")


def in_a_fresh_thread() -> None:
    """Run two kernels in a thread that never used the GPU: one that the main thread has loaded, and a new one."""
    equals_torch(2.0)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            equals_torch(2.0)
            equals_torch(4.0)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def timed() -> Iterator[Workload]:
    """The workloads to time: every neuron in 32 and 16 bits for the usual T, and GLIF with channels innermost."""
    for neuron in ("klif", "clif", "glif-channel"):
        for dtype in ("float32", "float16"):
            for steps in (4, 8, 16):
                yield Workload(neuron, steps, LARGE, dtype, device="cuda")
    for dtype in ("float32", "float16"):
        yield Workload("glif-channel", 4, LARGE, dtype, "channels_last", device="cuda")


def timings(out: str) -> None:
    """Time every kernel beside a copy of as many bytes, and write each row as soon as it is measured."""
    rows: list[dict[str, Any]] = []
    for workload in timed():
        for row in shares(workload):
            rows.append(row)
            Path(out).write_text(json.dumps(rows, indent=1) + "\n")
            print(*(row[key] for key in ("neuron", "pass", "dtype", "T", "layout")), f"{row['share']:.0%} of a copy")


def shares(workload: Workload, backend: str = "cupy") -> Iterator[dict[str, Any]]:
    """By pass, the share of copy bandwidth that a training call reaches. Such a call keeps no final states."""
    node = ours(workload.neuron, backend, workload.steps, workload.shape[2]).to(workload.device)
    x, grad = workload.inputs()
    x = x * 1.0
    learned = [p for p in node.parameters() if p.requires_grad]

    spikes = node(x)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: node(x),
        "backward": lambda: torch.autograd.grad(spikes, [x, *learned], grad, retain_graph=True),
    }
    for of_pass, call in calls.items():
        copied = torch.zeros(x.numel() * PASSES[of_pass] // 2, dtype=x.dtype, device=x.device)
        source = torch.ones_like(copied)
        copy, kernel = milliseconds(partial(copied.copy_, source)), milliseconds(call)
        del copied, source
        yield {
            "neuron": workload.neuron.removesuffix("-channel"),
            "pass": of_pass,
            "dtype": workload.dtype,
            "T": workload.steps,
            "layout": workload.layout.replace("_", "-"),
            "microseconds": kernel * 1e3,
            "copy_microseconds": copy * 1e3,
            "share": copy / kernel,
        }


def milliseconds(call: Callable[[], Any], times: int = 20) -> float:
    """The median time by CUDA events. All calls queue behind a long wait, so the host stays ahead of the device."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def profiled() -> None:
    """Run the two kernels that a profiler looks at."""
    for neuron, of_pass in (("klif", "forward"), ("glif-channel", "backward")):
        workload = Workload(neuron, 4, LARGE, "float16", device="cuda")
        node, (x, grad) = ours(neuron, "cupy", 4, workload.shape[2]).cuda(), workload.inputs()
        if of_pass == "forward":
            with torch.no_grad():
                node(x)
        else:
            node(x).backward(grad)
    torch.cuda.synchronize()


CHECKS: dict[str, Callable[..., None]] = {
    check.__name__: check for check in (versions, equals_torch, in_a_fresh_thread, timings, profiled)
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](*sys.argv[2:])
