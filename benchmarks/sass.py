"""Read the machine code that NVRTC makes of a kernel, and predict its share of a GPU's copy bandwidth without a GPU.

python benchmarks/sass.py --neuron klif --dtype float16 --T 4 [--pass backward] [--layout channels-last] [--arch 90]
python benchmarks/sass.py --table     # all of them: benchmarks/predicted.json, docs/predicted.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench import scoreboard
from bench.machine_code import Code, Issued, Warp, codes, compile_cubin, disassemble, launch_fields
from bench.neurons import ours

from klif_sj.codegen.kernel import Kernel
from klif_sj.runtime import cuda
from klif_sj.runtime.layout import Geometry

ROOT = Path(__file__).parents[1]
JSON = ROOT / "benchmarks" / "predicted.json"
PAGE = ROOT / "docs" / "predicted.md"
KERNELS = ROOT / "docs" / "kernels.md"
Row = dict[str, Any]
BEGIN, END = "<!-- written by benchmarks/sass.py -->", "<!-- until here -->"
"""The marks around the part of docs/kernels.md that is written from the table."""

NEURONS = {"klif": "klif", "clif": "clif", "glif": "glif-channel"}
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("contiguous", "channels-last")
PASSES = ("forward", "backward")
CHANNELS, POSITIONS, SIZE = 64, 1024, 1 << 26
"""The layer's channels, the positions of a channel, and the number of neurons times steps."""


@dataclass(frozen=True)
class Found:
    """What is known of a kernel without running it. Counts are those of a thread or a warp in one turn."""

    neuron: str
    pass_: str
    dtype: str
    T: int
    layout: str
    vector: int
    registers: int
    spills: int
    warps: int
    blocks: int
    loads: dict[str, int]
    stores: dict[str, int]
    barriers: int
    memory_waits: float
    bytes_in_flight: int
    instructions_per_neuron_step: float
    finish_microseconds: float
    predicted_share: float
    at_16_bytes: dict[str, Any] | None = None
    """For a kernel with narrower accesses: registers, spills and share of the same kernel with 16 bytes at a time.
    This is empty if that kernel does not compile, and only the table has it.
    """

    def row(self) -> dict[str, Any]:
        """The row of the table, as a JSON object."""
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


def main() -> int:
    options = parse_arguments()
    if options.table:
        rows = [with_16_bytes(read(*case, options.arch)).row() for case in cases()]
        JSON.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        PAGE.write_text(page(rows))
        KERNELS.write_text(with_limits(KERNELS.read_text(), rows))
        print(JSON, PAGE, KERNELS, sep="\n")
        return 0
    for pass_ in (options.pass_,) if options.pass_ else PASSES:
        found = read(options.neuron, pass_, options.dtype, options.T, options.layout, options.arch)
        for name, value in list(found.row().items())[:-1]:
            print(f"{name.replace('_', ' '):30} {value}")
        print()
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/sass.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--neuron", choices=tuple(NEURONS), default="klif")
    add("--dtype", choices=(*DTYPES, "float64"), default="float32")
    add("--T", type=int, default=4)
    add("--pass", dest="pass_", choices=PASSES, help="default: both")
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
    """The neuron, pass, dtype, T and layout of every row of the table."""
    return [
        (neuron, pass_, dtype, steps, layout)
        for neuron in NEURONS
        for layout in (LAYOUTS if neuron == "glif" else LAYOUTS[:1])
        for dtype in DTYPES
        for pass_ in PASSES
        for steps in (4, 8, 16)
    ]


def kernel_of(neuron: str, pass_: str, dtype: str, steps: int, layout: str) -> Kernel:
    node = ours(NEURONS[neuron], "torch", steps, CHANNELS)
    program = node.program(torch.float64 if dtype == "float64" else torch.float32)
    by_channel = any(p.per_channel for p in program.parameters)
    channels_innermost = by_channel and layout == "channels-last"
    return Kernel(program, steps, getattr(torch, dtype), channels_innermost, False, pass_ == "backward")


def geometry_of(kernel: Kernel) -> Geometry:
    neurons = SIZE // kernel.steps
    if kernel.channels_innermost:
        return Geometry(neurons // CHANNELS, CHANNELS, 1)
    if any(p.per_channel for p in kernel.program.parameters):
        return Geometry(neurons // (CHANNELS * POSITIONS), CHANNELS, POSITIONS)
    return Geometry(1, 1, neurons)


def with_16_bytes(found: Found) -> Found:
    """The same with ``at_16_bytes``, if the kernel's threads move less than 16 bytes at a time."""
    wide = 16 // getattr(torch, found.dtype).itemsize
    if found.vector == wide:
        return found
    try:
        other = read(found.neuron, found.pass_, found.dtype, found.T, found.layout, 90, wide)
    except RuntimeError as error:
        if "ptxas error" not in str(error):
            raise
        return replace(found, at_16_bytes={})
    names = "registers", "spills", "warps", "predicted_share"
    return replace(found, at_16_bytes={name: getattr(other, name) for name in names})


def read(neuron: str, pass_: str, dtype: str, steps: int, layout: str, arch: int, vector: int | None = None) -> Found:
    kernel = kernel_of(neuron, pass_, dtype, steps, layout)
    geometry = geometry_of(kernel)
    vector = vector or cuda.vector_width(kernel)
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
    turns = rows if not kernel.channels_innermost else math.ceil(rows * cuda.block_width(CHANNELS, vector) / threads)
    loads, stores = widths(trace, "LDG", packs), widths(trace, "STG", packs)
    return Found(
        neuron, pass_, dtype, steps, layout, vector,
        registers=code.registers,
        spills=code.spilled,
        warps=warps,
        blocks=blocks,
        loads={width: count // turns for width, count in loads.items()},
        stores={width: count // turns for width, count in stores.items()},
        barriers=sum(one.instruction.opcode.startswith("BAR") for one in trace if one.executed),
        memory_waits=round(memory_waits(trace, packs) / turns, 1),
        bytes_in_flight=sum(int(width.split()[0]) * count // turns for width, count in loads.items()) * 32 * warps,
        instructions_per_neuron_step=round(len(trace) * blocks * threads / SIZE, 1),
        finish_microseconds=round(finish * 1e6, 1),
        predicted_share=round(min(moved / scoreboard.BANDWIDTH / (seconds + finish), 1.0), 2),
    )  # fmt: skip


def finish_seconds(kernel: Kernel, functions: dict[str, Code], arch: int, geometry: Geometry, shares: int) -> float:
    """The time of the second pass, and of the microsecond between two kernels."""
    code, threads = functions["finish"], cuda.BLOCK
    trace = Warp(code, arch, fields(kernel, geometry, shares)).issued()
    steps = scoreboard.steps_of(trace, {})
    blocks = kernel.grads * geometry.channels
    resident = scoreboard.resident_blocks(code.registers, threads, code.shared)
    lives = math.ceil(blocks / scoreboard.PROCESSORS) * threads // 32 / scoreboard.QUARTERS
    return scoreboard.cycles(steps, max(resident * threads // 128, 1), max(round(lives), 1)) / scoreboard.CLOCK + 1e-6


def fields(kernel: Kernel, geometry: Geometry, rows: int) -> dict[int, tuple[str, int | None]]:
    """The argument block of a usual training call, where states start at zero and final states are not asked for."""
    neurons = geometry.neurons
    numbers = {
        "x_stride": neurons,
        "grad_spikes_stride": neurons,
        "rows": rows,
        "channel_repeat": 1,
        "initial_value": 0,
    }
    numbers |= geometry._asdict()
    missing = {"initial", "final", "sequences", "grad_final", "grad_sequences", "grad_initial"}
    missing |= {"checkpoints"} if kernel.steps <= cuda.segment(kernel.program) else set()
    found: dict[int, tuple[str, int | None]] = {}
    listed = launch_fields(len(kernel.program.states), len(kernel.program.parameters))
    for index, (name, is_pointer) in enumerate(listed):
        value = (0 if name in missing else (index + 1) << 40) if is_pointer else numbers.get(name, 1)
        found[8 * index] = ("*" * is_pointer + name, value)
    return found


INTRODUCTION = """\
# Predicted, not measured

No kernel of this page has run on a GPU. It is written by `python benchmarks/sass.py --table`, which compiles each
kernel with NVRTC for an H100 (sm_90), reads the machine code with `nvdisasm` (`pip install nvidia-cuda-nvdisasm`),
follows one warp through it, and runs a model of a multiprocessor. The rows are in `benchmarks/predicted.json`;
`python benchmarks/sass.py --neuron klif --dtype float16 --T 4` prints one of them.

The layer has 2^26 neuron-steps: GLIF has 64 channels of 1024 positions, or channels innermost (channels-last); KLIF
and CLIF have no parameters by channel, so that their layout does not matter. States start at zero, and final ones are
not asked for. **Share** is the time of a copy that moves as many bytes as the pass has to, at 3.0 TB/s, divided by the
kernel's, the second pass of its sums included.

The model: a quarter of a multiprocessor issues an instruction a cycle, at 1.9 GHz, of any warp that is ready. When a
warp is ready is written in the machine code: by stall counts, and by barriers that memory, shared memory and special
functions clear after a latency (700 cycles for memory, 24 to 40 for the rest). Integer, comparison and conversion
instructions take their pipe for two cycles, special functions for eight. Memory is a queue at its bandwidth. Registers
say how many blocks there are at a time. It knows nothing of the instruction cache, of DRAM's pages, or of a clock that
falls: take it for 10 points either way, and more where a share is low.

**Registers** and **spills** (bytes) are the assembler's. **Access** is what a thread loads at a time, **waits** how
often a warp waits for memory in a turn, **flight** the bytes that a multiprocessor has asked for at a time, **instr.**
the instructions that a warp issues for a step of 32 neurons.
"""


def page(rows: list[Row]) -> str:
    """The text of docs/predicted.md."""
    parts = [INTRODUCTION]
    for neuron in NEURONS:
        parts.append(f"\n## {neuron.upper()}\n")
        parts.append("| layout | pass | dtype | T | registers | spills | access | waits | flight | instr. | share |")
        parts.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in rows:
            if row["neuron"] == neuron:
                cells = [row[name] for name in ("layout", "pass", "dtype", "T", "registers", "spills")]
                cells += [", ".join(row["loads"]), f"{row['memory_waits']:g}", f"{row['bytes_in_flight'] >> 10} KiB"]
                cells += [row["instructions_per_neuron_step"], f"{row['predicted_share']:.0%}"]
                parts.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(parts) + "\n"


TARGETS: tuple[tuple[str, float, Callable[[Row], bool]], ...] = (
    ("forward of KLIF and GLIF", 0.95, lambda row: row["pass"] == "forward" and row["neuron"] != "clif"),
    ("float32", 0.95, lambda row: row["dtype"] == "float32"),
    (
        "backward of KLIF in 16 bits",
        0.90,
        lambda row: row["pass"] == "backward" and row["neuron"] == "klif" and row["dtype"] != "float32",
    ),
    (
        "forward of CLIF in float16",
        0.85,
        lambda row: row["pass"] == "forward" and row["neuron"] == "clif" and row["dtype"] == "float16",
    ),
    (
        "backward of GLIF in float16, T = 4",
        0.85,
        lambda row: (
            row["pass"] == "backward"
            and (row["neuron"], row["dtype"], row["T"], row["layout"]) == ("glif", "float16", 4, "contiguous")
        ),
    ),
)
"""What was asked of the kernels: a name, the least share, and which rows it is about."""

LAYOUTS_APART = 0.10
"""How far the share with channels innermost may be below the contiguous one."""


def limits(rows: list[Row]) -> str:
    """The part of docs/kernels.md that says what was asked of the kernels and what the model predicts."""
    lines = ["| asked for | at least | predicted, at least | below it |", "| --- | --- | --- | --- |"]
    for name, least, chosen in TARGETS:
        of_target = [row for row in rows if chosen(row)]
        below = [named(row) for row in of_target if row["predicted_share"] < least]
        lowest = min(row["predicted_share"] for row in of_target)
        lines.append(f"| {name} | {least:.0%} | {lowest:.0%} | {'; '.join(below) or 'none'} |")
    keys = "neuron", "pass", "dtype", "T"
    contiguous = {
        tuple(row[key] for key in keys): row["predicted_share"] for row in rows if row["layout"] == "contiguous"
    }
    apart = {
        named(row): contiguous[tuple(row[key] for key in keys)] - row["predicted_share"]
        for row in rows
        if row["layout"] != "contiguous"
    }
    below = [f"{name} ({gap:.0%})" for name, gap in apart.items() if round(gap, 2) > LAYOUTS_APART]
    most = max(apart.values())
    lines.append(
        f"| channels innermost below contiguous by | at most {LAYOUTS_APART:.0%} | at most {most:.0%} | "
        f"{'; '.join(below) or 'none'} |"
    )
    lines += ["", "| kernel | moves | registers | warps | share | at 16 bytes: registers | spills | warps | share |"]
    lines.append("| --- " * 9 + "|")
    for row in rows:
        if (wide := row["at_16_bytes"]) is not None:
            own = ", ".join(row["loads"]), row["registers"], row["warps"], f"{row['predicted_share']:.0%}"
            others = ("more than a block may have", "", "", "")
            if wide:
                others = (*(wide[key] for key in ("registers", "spills", "warps")), f"{wide['predicted_share']:.0%}")
            lines.append("| " + " | ".join(map(str, (named(row), *own, *others))) + " |")
    return "\n".join(lines)


def named(row: Row) -> str:
    layout = "" if row["layout"] == "contiguous" else f", {row['layout']}"
    return f"{row['neuron'].upper()} {row['pass']} {row['dtype']} T = {row['T']}{layout}"


def with_limits(text: str, rows: list[Row]) -> str:
    """The text of docs/kernels.md with the part that is written from the table."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{limits(rows)}\n\n{END}{rest.partition(END)[2]}"


def widths(trace: list[Issued], operation: str, packs: dict[str, int]) -> dict[str, int]:
    """By width, how many loads or stores of sequences and states a thread makes."""
    return dict(
        Counter(
            f"{one.instruction.width} bytes"
            for one in trace
            if one.executed and one.instruction.opcode.startswith(operation) and one.pointers & packs.keys()
        )
    )


def memory_waits(trace: list[Issued], packs: dict[str, int]) -> int:
    """How often a warp waits for sequences and states that it has loaded."""
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
