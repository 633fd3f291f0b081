"""What is read from machine code, and the page that is made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sass
from bench import machine_code, scoreboard
from bench.machine_code import Warp

from klif_sj.runtime import cuda

pytestmark = pytest.mark.once

LOG = """\
ptxas info    : Compiling entry function 'forward' for 'sm_90'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 1024 bytes smem, 0 bytes cmem[0]
ptxas info    : Compile time = 1.000 ms
"""

# Two turns of a loop that loads, waits, computes and stores; c[0x0][0x210] holds x, 0x218 spikes, 0x220 the turns.
# A null pointer at 0x228 switches the second load off. The slow path of a division is a call.
LINES = [
    ("ULDC.64 UR4, c[0x0][0x228]", 4, 7, 0),
    ("MOV R20, RZ", 1, 7, 0),
    ("ISETP.NE.U32.AND P0, PT, RZ, UR4, PT", 13, 7, 0),
    ("ISETP.NE.AND.EX P0, PT, RZ, UR5, PT, P0", 13, 7, 0),
    "TOP",
    ("LDC.64 R2, c[0x0][0x210]", 1, 0, 0),
    ("LDG.E.128 R4, desc[UR8][R2.64]", 1, 1, 0b1),
    ("@P0 LDG.E.64 R8, desc[UR8][R2.64]", 1, 1, 0),
    ("FADD R4, R4, R5", 4, 7, 0b10),
    ("@!P1 BRA `(.L_x_1)", 5, 7, 0),
    ("CALL.REL.NOINC `($slow)", 5, 7, 0),
    "JOIN",
    ("LDC.64 R10, c[0x0][0x218]", 1, 0, 0),
    ("STG.E.128 desc[UR8][R10.64], R4", 1, 7, 0b1),
    ("IADD3 R20, R20, 0x1, RZ", 13, 7, 0),
    ("ISETP.GE.AND P2, PT, R20, c[0x0][0x220], PT", 13, 7, 0),
    ("@!P2 BRA `(.L_x_0)", 5, 7, 0),
    ("EXIT", 5, 7, 0),
]


def disassembly() -> str:
    """As nvdisasm prints it with ``-c -hex``."""
    text, address = '\t.section\t.text.forward,"ax",@progbits\nforward:\n', 0
    for line in LINES:
        if isinstance(line, str):
            text += {"TOP": ".L_x_0:\n", "JOIN": ".L_x_1:\n"}[line]
            continue
        instruction, stall, sets, waits = line
        control = (stall | sets << 5 | 7 << 8 | waits << 11) << 41
        text += f"        /*{address:04x}*/   {instruction} ;   /* 0x{0:016x} */\n   /* 0x{control:016x} */\n"
        address += 16
    return text


FIELDS = {0: ("*x", 1 << 40), 8: ("*spikes", 2 << 40), 16: ("turns", 2), 24: ("*initial", 0)}


def test_a_recorded_disassembly() -> None:
    code = machine_code.codes(disassembly(), LOG)["forward"]
    assert (code.registers, code.spilled, code.shared) == (32, 12, 1024)
    first = code.instructions[0]
    assert (first.opcode, first.operands, first.stall, first.sets) == ("ULDC.64", ("UR4", "c[0x0][0x228]"), 4, 7)
    trace = Warp(code, 90, FIELDS).issued()
    names = [one.instruction.opcode for one in trace if one.executed]
    assert names.count("LDG.E.128") == names.count("STG.E.128") == 2  # two turns
    assert "LDG.E.64" not in names  # its pointer is null
    assert "CALL.REL.NOINC" not in names
    packs = {"*x": 16, "*spikes": 16}
    assert sass.widths(trace, "LDG", packs) == sass.widths(trace, "STG", packs) == {"16 bytes": 2}
    assert sass.memory_waits(trace, packs) == 2


def test_the_model_waits_for_memory_and_for_its_bandwidth() -> None:
    trace = Warp(machine_code.codes(disassembly(), LOG)["forward"], 90, FIELDS).issued()
    steps = scoreboard.steps_of(trace, {"*x": 16, "*spikes": 16})
    alone = scoreboard.cycles(steps, 1, 1)
    assert 2 * scoreboard.MEMORY_LATENCY < alone < 2 * scoreboard.MEMORY_LATENCY + 1000
    moved = 64 * 4 * 512
    least = moved / (scoreboard.BANDWIDTH / scoreboard.PROCESSORS / scoreboard.QUARTERS / scoreboard.CLOCK)
    assert least <= scoreboard.cycles(steps, 16, 64) < 1.2 * least
    assert scoreboard.cycles(steps, 2, 64) > 1.5 * least  # two warps do not hide the latency


def test_how_many_blocks_fit() -> None:
    assert scoreboard.resident_blocks(registers=128, threads=128, shared=0) == 4
    assert scoreboard.resident_blocks(registers=32, threads=128, shared=0) == 16
    assert scoreboard.resident_blocks(registers=32, threads=128, shared=48 << 10) == 4


def test_the_argument_block_is_read_from_the_header() -> None:
    names = [name for name, _ in machine_code.launch_fields(2, 3)]
    assert names[:3] == ["x", "x_stride", "spikes"]
    assert names.count("initial") == 2
    assert names.count("parameters") == 3
    assert dict(machine_code.launch_fields(2, 3))["rows"] is False


def test_the_page_is_what_the_table_says() -> None:
    rows = json.loads(sass.JSON.read_text())
    assert sass.PAGE.read_text() == sass.page(rows)
    assert sass.PAGE.read_text().startswith("# Predicted, not measured")
    assert [tuple(row[key] for key in ("neuron", "pass", "dtype", "T", "layout")) for row in rows] == sass.cases()
    assert {"registers", "spills", "instructions_per_neuron_step", "predicted_share"} <= rows[0].keys()


def test_what_cannot_be_had_is_what_the_table_says() -> None:
    """Every kernel with narrow accesses says what wide ones would cost, and none would gain by them."""
    rows, text = json.loads(sass.JSON.read_text()), sass.KERNELS.read_text()
    assert sass.with_limits(text, rows) == text
    for row in rows:
        narrow = set(row["loads"]) != {"16 bytes"}
        assert (row["at_16_bytes"] is not None) is narrow
        assert (sass.named(row) in text) or not narrow
        if wide := row["at_16_bytes"]:
            assert wide["predicted_share"] < row["predicted_share"] or wide["spills"]


def test_the_table_has_the_widths_that_a_launch_takes() -> None:
    """A table from before a change of the rule for widths would show kernels that nobody runs."""
    names = ("neuron", "pass", "dtype", "T", "layout")
    table = {tuple(row[name] for name in names): row["vector"] for row in json.loads(sass.JSON.read_text())}
    assert table == {case: cuda.vector_width(sass.kernel_of(*case)) for case in sass.cases()}
    wide = {case for case, vector in table.items() if vector * (4 if case[2] == "float32" else 2) == 16}
    assert {("klif", "backward", "float32", 16, "contiguous"), ("klif", "forward", "float16", 16, "contiguous")} < wide
    assert ("glif", "forward", "float16", 16, "contiguous") in wide
    assert ("glif", "forward", "float32", 16, "channels-last") in wide
    assert ("clif", "forward", "float16", 16, "contiguous") not in wide, "its sigmoids need more warps"


def test_a_missing_disassembler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine_code.disassembler.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine_code.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-nvdisasm"):
        machine_code.disassembler()
    machine_code.disassembler.cache_clear()
