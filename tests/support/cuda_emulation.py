"""Runs the CUDA kernels on the CPU: the very source that NVRTC compiles, under a small emulation of threads."""

from __future__ import annotations

import functools
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from klif_sj.codegen.kernel import Kernel
from klif_sj.neuron import on_kernels
from klif_sj.runtime import cpu, cuda, scan

LAUNCHER = """
struct Launch {{ int64 blocks, threads; Call call; }};
static Call current;
extern "C" void launch_{name}(const Launch *launch) {{
    current = launch->call;
    fibers::body = [] {{ {name}(current); }};
    for (int64 b = 0; b < launch->blocks; b++) {{
        blockIdx.x = b;
        fibers::run_block(launch->threads);
    }}
}}
"""


@functools.cache
def _compiled(kernel: Kernel, vector: int, name: str) -> Callable[[bytes], int]:
    emulation = Path(__file__).with_name("cuda_on_cpu.h").read_text()
    source = "\n".join((emulation, cuda.source(kernel, vector), LAUNCHER.format(name=name)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "FLAGS", ("-O1", *cpu.FLAGS[1:]))  # it runs a few neurons once: compile time counts
        return cpu.function_of(source, f"launch_{name}")


class Emulation:
    """What was launched, and on how wide vectors."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int]] = []

    def submit(self, kernel: Kernel, vector: int, name: str, blocks: int, call: bytes, device: torch.device) -> None:
        self.launches.append((name, vector, blocks))
        _compiled(kernel, vector, name)(struct.pack("@2q", blocks, cuda.BLOCK) + call)


def emulate(monkeypatch: pytest.MonkeyPatch, processors: int = 1) -> Emulation:
    """CPU tensors go to the CUDA kernels, which run emulated, as on a GPU with that many processors."""
    emulation = Emulation()
    monkeypatch.setattr(cuda, "submit", emulation.submit)
    monkeypatch.setattr(cuda, "processors", lambda device: processors)
    monkeypatch.setitem(scan.TARGETS, "cpu", cuda)
    monkeypatch.setattr(on_kernels, "_plans", weakref.WeakKeyDictionary())
    return emulation
