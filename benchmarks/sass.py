"""Read what NVRTC makes of a kernel, without a GPU, and predict its share of copy bandwidth on one.

python benchmarks/sass.py --neuron klif --dtype float16 --T 4 [--pass backward] [--layout channels-last] [--arch 90]
python benchmarks/sass.py --table     # all of them: benchmarks/predicted.json, docs/predicted.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench import scoreboard
from bench.machine_code import Code, Issued, Warp, codes, compile_cubin, disassemble, launch_fields
from bench.neurons import ours

from klif_sj.codegen.kernel import Kernel
from klif_sj.codegen.program import Program
from klif_sj.runtime import cuda, dispatch
from klif_sj.runtime.layout import Geometry

ROOT = Path(__file__).parents[1]
JSON = ROOT / "benchmarks" / "predicted.json"
PAGE = ROOT / "docs" / "predicted.md"

NEURONS = {"klif": "klif", "clif": "clif", "glif": "glif-channel"}
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("contiguous", "channels-last")
CHANNELS, POSITIONS, SIZE = 64, 1024, 1 << 26
"""Of the layer: channels, positions of a channel, and neurons times steps."""


@dataclass(frozen=True)
class Found:
    """What is known of a kernel without running it."""

    neuron: str
    pass_: str
    dtype: str
    T: int
    layout: str
    arch: int
    vector: int
    registers: int
    spills: int
    warps: int
    blocks: int
    loads: dict[str, int]
    stores: dict[str, int]
    barriers: int
    memory_waits: int
    bytes_in_flight: int
    instructions_per_neuron_step: float
    finish_microseconds: float
    predicted_share: float


def main() -> int:
    options = parse_arguments()
    if options.table:
        found = [read(*case, options.arch) for case in cases()]
        JSON.write_text(json.dumps([row(one) for one in found], indent=1) + "\n")
        PAGE.write_text(page(json.loads(JSON.read_text())))
        print(JSON, PAGE, sep="\n")
        return 0
    passes = (options.pass_,) if options.pass_ else ("forward", "backward")
    for pass_ in passes:
        for name, value in asdict(
            read(options.neuron, pass_, options.dtype, options.T, options.layout, options.arch)
        ).items():
            print(f"{name.rstrip('_').replace('_', ' '):30} {value}")
        print()
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/sass.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--neuron", choices=tuple(NEURONS), default="klif")
    add("--dtype", choices=(*DTYPES, "float64"), default="float32")
    add("--T", type=int, default=4)
    add("--pass", dest="pass_", choices=("forward", "backward"), help="default: both")
    add("--layout", choices=LAYOUTS, default="contiguous")
    add(
        "--arch",
        type=int,
        default=90,
        help="75 for sm_75, ... (default: 90; the model's clock and memory are an H100's)",
    )
    add("--table", action="store_true", help="write benchmarks/predicted.json and docs/predicted.md")
    return parser.parse_args()


def cases() -> list[tuple[str, str, str, int, str]]:
    """Neuron, pass, dtype, T and layout of everything in the table."""
    return [
        (neuron, pass_, dtype, steps, layout)
        for neuron in NEURONS
        for layout in (LAYOUTS if neuron == "glif" else LAYOUTS[:1])
        for dtype in DTYPES
        for pass_ in ("forward", "backward")
        for steps in (4, 8, 16)
    ]


def kernel_of(neuron: str, pass_: str, dtype: str, steps: int, layout: str) -> Kernel:
    node = ours(NEURONS[neuron], "torch", steps, CHANNELS)
    real = torch.float64 if dtype == "float64" else torch.float32
    _, kinds = dispatch._arguments(node, node.effective_parameters())
    program = Program.decode(node.step_program(real, kinds, pass_ == "backward")[0])
    by_channel = any(p.per_channel for p in program.parameters)
    columns = by_channel and layout == "channels-last"
    return Kernel(program, steps, getattr(torch, dtype), columns, False, pass_ == "backward")


def geometry_of(kernel: Kernel) -> Geometry:
    neurons = SIZE // kernel.steps
    if kernel.columns:
        return Geometry(neurons // CHANNELS, CHANNELS, 1)
    if any(p.per_channel for p in kernel.program.parameters):
        return Geometry(neurons // (CHANNELS * POSITIONS), CHANNELS, POSITIONS)
    return Geometry(1, 1, neurons)


def read(neuron: str, pass_: str, dtype: str, steps: int, layout: str, arch: int) -> Found:
    kernel = kernel_of(neuron, pass_, dtype, steps, layout)
    geometry = geometry_of(kernel)
    vector = cuda.vector_width(kernel)
    blocks, rows, shares = cuda.grid(kernel, geometry, vector, scoreboard.PROCESSORS)
    cubin, log = compile_cubin(cuda.source(kernel, vector), arch, cuda.OPTIONS)
    functions = codes(disassemble(cubin), log)
    code = functions[pass_]
    trace = Warp(code, arch, fields(kernel, geometry, rows)).issued()
    size, real = kernel.dtype.itemsize, 8 if kernel.program.dtype == "float64" else 4
    packs = dict.fromkeys(("*x", "*spikes", "*grad_spikes", "*grad_x"), vector * size)
    packs |= dict.fromkeys(("*initial", "*final", "*checkpoints", "*grad_final", "*grad_initial"), vector * real)
    threads = cuda.BLOCK
    found = scoreboard.steps_of(trace, packs)
    resident = scoreboard.resident_blocks(code.registers, threads, code.shared)
    warps = resident * threads // 32
    lives = math.ceil(blocks / scoreboard.PROCESSORS) * (threads // 32) / scoreboard.QUARTERS
    seconds = scoreboard.cycles(found, max(round(warps / 4), 1), max(round(lives), 1)) / scoreboard.CLOCK
    finish = finish_seconds(kernel, functions, arch, geometry, shares) if kernel.grads else 0.0
    moved = (3 if kernel.backward else 2) * SIZE * size
    neuron_steps = SIZE / (blocks * threads / 32) / 32 * 1.0  # of a lane of a warp
    return Found(
        neuron, pass_, dtype, steps, layout, arch, vector,
        registers=code.registers,
        spills=code.spilled,
        warps=warps,
        blocks=blocks,
        loads=widths(trace, "LDG", packs),
        stores=widths(trace, "STG", packs),
        barriers=sum(one.instruction.opcode.startswith("BAR") for one in trace if one.executed),
        memory_waits=memory_waits(trace, packs, rows),
        bytes_in_flight=0,
        instructions_per_neuron_step=round(len(trace) / neuron_steps, 1),
        finish_microseconds=round(finish * 1e6, 1),
        predicted_share=round(min(moved / scoreboard.BANDWIDTH / (seconds + finish), 1.0), 2),
    )  # fmt: skip


def finish_seconds(kernel: Kernel, functions: dict[str, Code], arch: int, geometry: Geometry, shares: int) -> float:
    """The second pass, and the microsecond between two kernels."""
    code, threads = functions["finish"], cuda.BLOCK
    trace = Warp(code, arch, fields(kernel, geometry, shares)).issued()
    steps = scoreboard.steps_of(trace, {})
    blocks = kernel.grads * geometry.channels
    resident = scoreboard.resident_blocks(code.registers, threads, code.shared)
    lives = math.ceil(blocks / scoreboard.PROCESSORS) * threads // 32 / scoreboard.QUARTERS
    return scoreboard.cycles(steps, max(resident * threads // 128, 1), max(round(lives), 1)) / scoreboard.CLOCK + 1e-6


def fields(kernel: Kernel, geometry: Geometry, rows: int) -> dict[int, tuple[str, int | None]]:
    """The argument block of a usual training call: states start at zero, and nobody asks for the final ones."""
    neurons = geometry.neurons
    numbers = {"x_stride": neurons, "grad_spikes_stride": neurons, "rows": rows, "neighbours": 1, "initial_value": 0}
    numbers |= geometry._asdict()
    missing = {"initial", "final", "sequences", "grad_final", "grad_sequences", "grad_initial"}
    missing |= {"checkpoints"} if kernel.steps <= cuda.segment(kernel.program) else set()
    found: dict[int, tuple[str, int | None]] = {}
    listed = launch_fields(len(kernel.program.states), len(kernel.program.parameters))
    for index, (name, is_pointer) in enumerate(listed):
        value = (0 if name in missing else (index + 1) << 40) if is_pointer else numbers.get(name, 1)
        found[8 * index] = ("*" * is_pointer + name, value)
    return found


def widths(trace: list[Issued], operation: str, packs: dict[str, int]) -> dict[str, int]:
    """How many loads or stores of each width a thread makes of the sequences and states."""
    return dict(
        Counter(
            f"{one.instruction.width} bytes"
            for one in trace
            if one.executed and one.instruction.opcode.startswith(operation) and one.pointers & packs.keys()
        )
    )


def memory_waits(trace: list[Issued], packs: dict[str, int], rows: int) -> int:
    """How often a warp waits for sequences that it asked for, a turn."""
    pending: set[int] = set()
    waits = 0
    for one in trace:
        waited = {barrier for barrier in pending if one.instruction.waits >> barrier & 1}
        if waited:
            waits += 1
            pending -= waited
        if one.executed and one.instruction.opcode.startswith("LDG") and one.pointers & packs.keys():
            pending.add(one.instruction.sets)
    return waits


if __name__ == "__main__":
    sys.exit(main())
