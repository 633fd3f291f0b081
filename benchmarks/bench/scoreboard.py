"""Predict how long a kernel takes on a GPU, by an issue-slot and scoreboard model of one multiprocessor.

A quarter of a multiprocessor issues one instruction a cycle, from the oldest warp that is ready. A warp is ready when
the stall count of its last instruction is over and the barriers that it waits for are cleared; both are in the machine
code. An instruction that takes a time of its own (memory, shared memory, special functions) clears its barrier after
the latency below. Memory is a queue that serves its share of the bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .machine_code import Issued

CLOCK = 1.9e9
BANDWIDTH = 3.0e12
PROCESSORS = 132
QUARTERS = 4

REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 << 10
"""What a multiprocessor has for all the blocks that it runs at a time."""

MEMORY_LATENCY, L2_LATENCY, L1_LATENCY = 700, 280, 40
L2_BYTES = 16
"""How many bytes a quarter's share of the second-level cache takes in a cycle. They are counted in sectors of 32."""

LATENCIES = {"LDC": 30, "MUFU": 30, "LDS": 30, "STS": 20, "SHFL": 26, "S2R": 30, "S2UR": 30, "BAR": 40, "STG": 20}
USUAL_LATENCY = 24

SLOTS = {"MUFU": 8, "F2F": 8, "I2F": 8, "F2I": 8, "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16}
"""For how many cycles an instruction of a warp takes its pipe, if that is more than one."""
HALF_RATE = frozenset((
    "IADD3", "LOP3", "ISETP", "FSETP", "FSEL", "FSET", "FMNMX", "SEL", "SHF", "PRMT", "LEA", "PLOP3", "IMNMX", "ISCADD",
    "FCHK", "HADD2", "F2FP", "VIADD", "VIMNMX",
))  # fmt: skip
"""The operations of the integer and logical pipe, which has 16 lanes in each quarter."""


@dataclass(frozen=True)
class Step:
    """What the model needs to know about an instruction that a warp issues."""

    stall: int
    sets: int
    reads: int
    waits: int
    pipe: str
    slots: int
    latency: int
    dram: float = 0.0
    l2: float = 0.0


def steps_of(trace: Sequence[Issued], packs: dict[str, int]) -> list[Step]:
    """:param packs: by the name of a pointer, how many neighbouring bytes a thread has there"""
    return [_step(issued, packs) for issued in trace]


def _step(issued: Issued, packs: dict[str, int]) -> Step:
    instruction = issued.instruction
    operation = instruction.opcode.partition(".")[0]
    latency, dram, l2, pipe, slots = LATENCIES.get(operation, USUAL_LATENCY), 0.0, 0.0, "", 1
    if operation in SLOTS:
        pipe, slots = ("fp64" if operation.startswith("D") else "special"), SLOTS[operation]
    elif operation in HALF_RATE:
        pipe, slots = "integer", 2
    elif operation in ("LDG", "STG", "LDS", "STS", "SHFL"):
        pipe, slots = "memory", 2
    sets, reads = instruction.sets, instruction.reads
    if not issued.executed:
        latency = USUAL_LATENCY
    elif operation in ("LDG", "STG"):
        pack = next((packs[name] for name in issued.pointers if name in packs), 0)
        if pack:
            dram = 32 * instruction.width
            l2 = 32 * min(pack, 32)
            latency = MEMORY_LATENCY if operation == "LDG" else LATENCIES["STG"]
        elif operation == "LDG":
            of_partial = any("partial" in name for name in issued.pointers)
            latency, l2 = (L2_LATENCY, 128) if of_partial else (L1_LATENCY, 0)
    return Step(instruction.stall, sets, reads, instruction.waits, pipe, slots, latency, dram, l2)


def resident_blocks(registers: int, threads: int, shared: int) -> int:
    """How many blocks a multiprocessor runs at a time."""
    warps = threads // 32
    by_registers = REGISTERS // (math.ceil(registers * 32 / 256) * 256) // warps
    by_shared = SHARED // (shared + 1024)
    return max(min(by_registers, THREADS // threads, BLOCKS, by_shared), 1)


def cycles(steps: Sequence[Step], resident: int, lives: int) -> float:
    """How many cycles a quarter takes for ``lives`` warps, ``resident`` at a time, each of which issues ``steps``."""
    bandwidth = BANDWIDTH / PROCESSORS / QUARTERS / CLOCK
    resident = max(min(resident, lives), 1)
    count = len(steps)
    position = [0] * resident
    # The blocks of a quarter do not start in the same cycle.
    ready = [float(40 * warp) for warp in range(resident)]
    cleared = [[0.0] * 8 for _ in range(resident)]
    pipes: dict[str, float] = {}
    memory = l2 = now = 0.0
    started, running = resident, list(range(resident))
    while running:
        best, chosen = math.inf, -1
        for warp in running:
            step = steps[position[warp]]
            at = ready[warp]
            free = pipes.get(step.pipe, 0.0) if step.pipe else 0.0
            at = max(at, free)
            if at <= now:
                best, chosen = now, warp
                break
            if at < best:
                best, chosen = at, warp
        now = max(now, best)
        step = steps[position[chosen]]
        barriers = cleared[chosen]
        done = now + step.latency
        if step.pipe:
            pipes[step.pipe] = now + step.slots
        if step.l2:
            l2 = max(l2, now) + step.l2 / L2_BYTES
            done = max(done, l2 + (step.latency if step.sets < 7 else 0))
        if step.dram:
            memory = max(memory, now) + step.dram / bandwidth
            if step.sets < 7:
                done = max(done, memory + step.latency)
        if step.sets < 7:
            barriers[step.sets] = max(barriers[step.sets], done)
        if step.reads < 7:
            # The operands of a store are read when the memory's queue has room for it.
            read = max(now + 20, memory - 4000) if step.dram else now + 20
            barriers[step.reads] = max(barriers[step.reads], read)
        position[chosen] += 1
        if position[chosen] == count:
            if started < lives:
                position[chosen], started = 0, started + 1
                running.remove(chosen)
                running.append(chosen)
                cleared[chosen] = [0.0] * 8
                ready[chosen] = now + 200
            else:
                running.remove(chosen)
            now += 1
            continue
        following = steps[position[chosen]]
        at = now + max(step.stall, 1)
        mask = following.waits
        while mask:
            low = mask & -mask
            at = max(at, barriers[low.bit_length() - 1])
            mask ^= low
        ready[chosen] = at
        now += 1
    return max(now, memory, l2)
