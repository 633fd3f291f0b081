"""Read the machine code that NVRTC makes of a kernel, and list the instructions that one warp issues."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from klif_sj.codegen.call import FIELDS

PARAMETER_BASE = {75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
"""By architecture, the address of the argument block in constant bank 0."""


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly, with the scoreboard's part of its encoding."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None
    stall: int
    sets: int
    """The number of the barrier that is cleared when the result is there, 7 for none."""
    reads: int
    """The number of the barrier that is cleared when the operands have been read, 7 for none."""
    waits: int
    """The barriers that the instruction waits for, as a mask."""

    @property
    def width(self) -> int:
        """How many bytes a thread moves."""
        parts = self.opcode.split(".")
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in parts[1:] if part in sizes), 4)


@dataclass
class Issued:
    """An instruction that a warp issues on its way through a kernel."""

    instruction: Instruction
    executed: bool
    """False if the predicate is off. Then the instruction takes an issue slot and does nothing."""
    pointers: frozenset[str] = frozenset()
    """The pointers among the arguments from which the address was computed."""


@dataclass
class Code:
    """A function's machine code."""

    instructions: dict[int, Instruction]
    registers: int
    spilled: int
    shared: int
    order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order = sorted(self.instructions)


def compile_cubin(source: str, architecture: int, options: tuple[str, ...]) -> tuple[bytes, str]:
    """The cubin and NVRTC's log.

    :raises RuntimeError: with the log, if the source does not compile
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch=sm_{architecture}", *options, "--ptxas-options=-v"))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}") from error
    return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)  # getCUBIN leaves out the last byte


@functools.cache
def disassembler() -> str:
    """The path of nvdisasm.

    :raises FileNotFoundError: if it is not installed
    """
    found = shutil.which("nvdisasm")
    if found is None:
        folder = Path(sysconfig.get_path("purelib")) / "nvidia"
        found = next((str(path) for path in sorted(folder.glob("*/bin/nvdisasm"))), None)
    if found is None:
        raise FileNotFoundError(
            "nvdisasm: expected it on PATH or in this Python's site-packages, found it in neither: "
            "pip install nvidia-cuda-nvdisasm"
        )
    return found


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [disassembler(), "-c", "-hex", file.name], check=True, capture_output=True, text=True
        ).stdout


_ENCODING = r"/\* 0x([0-9a-f]{16}) \*/\s*"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);\s*" + 2 * _ENCODING)
_LABEL = re.compile(r"^\s*(\.?[\w$]+):", re.MULTILINE)
_SHARED = re.compile(r"(\d+) bytes smem")


def matched(pattern: str, text: str) -> re.Match[str]:
    """The first place in a text where a pattern matches.

    :raises ValueError: if there is none
    """
    if (found := re.search(pattern, text)) is None:
        raise ValueError(f"expected a text that matches {pattern!r}, got {text[:200]!r}")
    return found


def codes(disassembly: str, log: str) -> dict[str, Code]:
    """Every function of a cubin by name, from the disassembly and the assembler's log."""
    found = {}
    for section in re.split(r"(?=\t\.section\t\.text\.)", disassembly)[1:]:
        name = matched(r"\t\.section\t\.text\.(\w+)", section)[1]
        said = log[log.index(f"entry function '{name}'") :]
        found[name] = Code(
            _instructions(section),
            registers=int(matched(r"Used (\d+) registers", said)[1]),
            spilled=sum(map(int, matched(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())),
            shared=int(match.group(1)) if (match := _SHARED.search(said.partition("Compile time")[0])) else 0,
        )
    return found


def _instructions(section: str) -> dict[int, Instruction]:
    places = [(match.end(), int(match.group(1), 16)) for match in _LINE.finditer(section)]
    labels = {}
    for label in _LABEL.finditer(section):
        after = next((address for end, address in places if end > label.end()), None)
        if after is not None:
            labels[label.group(1)] = after
    found = {}
    for address, guard, opcode, operands, _, high in _LINE.findall(section):
        control = int(high, 16) >> 41
        target = re.search(r"`\((\.?[\w$]+)\)", operands)
        found[int(address, 16)] = Instruction(
            address=int(address, 16),
            guard=guard,
            opcode=opcode,
            operands=tuple(part.strip() for part in operands.split(",")) if operands.strip() else (),
            target=labels.get(target.group(1)) if target and opcode in ("BRA", "CALL.REL.NOINC") else None,
            stall=control & 15,
            sets=control >> 5 & 7,
            reads=control >> 8 & 7,
            waits=control >> 11 & 63,
        )
    return found


def launch_fields(states: int, parameters: int) -> Iterator[tuple[str, bool]]:
    """The name of every 8 bytes of the argument block, and whether they hold a pointer."""
    sizes = {"": 1, "STATES": states, "PARAMETERS": max(parameters, 1)}
    for each in FIELDS:
        yield from ((each.name, each.is_pointer),) * sizes[each.each]


_WORD = 0xFFFFFFFF
_WRITE_NOTHING = frozenset(("STG", "STS", "BAR", "BSSY", "BSYNC", "NOP", "WARPSYNC", "BRA", "EXIT"))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _bits_of(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little")


def _float_of(word: int) -> float:
    return float(struct.unpack("<f", word.to_bytes(4, "little"))[0])


def _logic(table: int, a: int, b: int, c: int) -> int:
    found = 0
    for index in range(8):
        if table >> index & 1:
            found |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return found & _WORD


def _next_register(operand: str) -> str:
    """The upper half of a register pair."""
    match = re.fullmatch(r"(U?R)(\d+)(?:\.reuse)?", operand)
    return f"{match.group(1)}{int(match.group(2)) + 1}" if match else "RZ"


class Warp:
    """Goes through a kernel as the first warp of the first block does, as far as this is known without running it.

    The argument block is known, and so is what integer instructions compute from it, such as whether a pointer is null
    or how often a loop repeats. At a branch that depends on data, the warp takes the way without a call, which is the
    slow path of a division. Otherwise it goes straight on.
    """

    def __init__(self, code: Code, architecture: int, fields: Mapping[int, tuple[str, int | None]]) -> None:
        """:param fields: by offset in the argument block, the name and the value, which every pointer has, even null"""
        self.code, self.base, self.fields = code, PARAMETER_BASE[architecture], fields
        self.values: dict[str, int | None] = {}
        self.pointers: dict[str, frozenset[str]] = {}

    def issued(self) -> list[Issued]:
        trace, place = [], 0
        order, index = self.code.order, {address: i for i, address in enumerate(self.code.order)}
        while True:
            instruction = self.code.instructions[order[place]]
            guard = self._guard(instruction.guard)
            if instruction.opcode == "EXIT" and guard is None:
                guard = False
            if instruction.opcode in ("BRA", "BRA.U") and guard is None:
                guard = self._avoids_call(instruction, place)
            executed = guard is not False
            trace.append(Issued(instruction, executed, self._address(instruction)))
            if len(trace) > 2_000_000:
                raise RuntimeError("a kernel does not come to its end: a loop's length is not understood")
            if executed and instruction.opcode == "EXIT":
                return trace
            if executed and instruction.opcode.startswith("BRA") and instruction.target is not None:
                place = index[instruction.target]
                continue
            if executed and not instruction.opcode.startswith("CALL"):
                self._compute(instruction, certain=guard is True)
            place += 1

    def _avoids_call(self, branch: Instruction, place: int) -> bool:
        """Whether a branch that depends on data is taken. It is if the instructions right behind it end in a call."""
        for address in self.code.order[place + 1 :]:
            operation = self.code.instructions[address].opcode
            if address == branch.target or operation.startswith(("BRA", "EXIT", "BSYNC")):
                return False
            if operation.startswith("CALL"):
                return True
        return False

    def _guard(self, guard: str) -> bool | None:
        if not guard:
            return True
        value = self._value(guard.lstrip("!"))
        return None if value is None else bool(value) != guard.startswith("!")

    def _value(self, operand: str) -> int | None:
        operand = operand.removesuffix(".reuse").removesuffix(".64")
        negative, inverted = operand.startswith("-"), operand.startswith("~")
        operand = operand.lstrip("-~!|").rstrip("|")
        if operand in ("RZ", "URZ", "SRZ"):
            value: int | None = 0
        elif operand in ("PT", "UPT"):
            value = 1
        elif re.fullmatch(r"0x[0-9a-f]+|\d+", operand):
            value = int(operand, 0)
        elif match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", operand):
            value = self._constant(int(match.group(1), 16))[1]
        else:
            value = self.values.get(operand)
        if value is None:
            return None
        return (-value if negative else ~value if inverted else value) & 0xFFFFFFFF

    def _constant(self, address: int) -> tuple[frozenset[str], int | None]:
        """The pointer to which 4 bytes of the constant bank belong, and the value of these bytes."""
        offset = address - self.base
        name, value = self.fields.get(offset - offset % 8, ("", None))
        pointer = frozenset((name,)) if name and value is not None and name.startswith("*") else frozenset()
        return pointer, None if value is None else value >> 32 * (offset % 8 == 4) & 0xFFFFFFFF

    def _sources(self, operands: tuple[str, ...]) -> frozenset[str]:
        found: set[str] = set()
        for operand in operands:
            for match in re.finditer(r"c\[0x0\]\[0x([0-9a-f]+)\]|\bU?R\d+\b", operand):
                if match.group(1):
                    found |= self._constant(int(match.group(1), 16))[0]
                else:
                    found |= self.pointers.get(match.group(0), frozenset())
        return frozenset(found)

    def _address(self, instruction: Instruction) -> frozenset[str]:
        if not instruction.opcode.startswith(("LDG", "STG")):
            return frozenset()
        place = next(operand for operand in instruction.operands if "[" in operand)
        return self._sources((place,))

    def _compute(self, instruction: Instruction, certain: bool) -> None:
        """Note what an instruction writes. The value is known if it is an integer operation on known operands."""
        operation, _, form = instruction.opcode.partition(".")
        if not instruction.operands or operation in _WRITE_NOTHING:
            return
        if operation in ("ISETP", "UISETP"):
            self._compare(form, instruction.operands, certain)
            return
        results, sources = list(instruction.operands[:1]), list(instruction.operands[1:])
        if operation in ("PLOP3", "UPLOP3", "LOP3", "ULOP3") and re.fullmatch(r"U?P(\d|T)", results[0]):
            results.append(sources.pop(0))
        else:
            while sources and re.fullmatch(r"U?P(\d|T)", sources[0]) and operation not in ("SEL", "USEL", "FSEL"):
                results.append(sources.pop(0))
        words = self._words(instruction)
        match = re.fullmatch(r"(U?R)(\d+)", results[0])
        names = [f"{match.group(1)}{int(match.group(2)) + word}" for word in range(words)] if match else results[:1]
        values: Sequence[int | None] = ()
        if certain:
            values = self._result(operation, form.split("."), sources, len(results) - 1, words)
        pointers = frozenset() if operation in ("LDG", "LDS", "S2R", "S2UR") else self._sources(tuple(sources))
        for name, value in itertools.zip_longest([*names, *results[1:]], values):
            if name is not None and "PT" not in name:
                self.values[name] = value
                self.pointers[name] = pointers if certain else pointers | self.pointers.get(name, frozenset())

    @staticmethod
    def _words(instruction: Instruction) -> int:
        opcode = instruction.opcode
        if opcode.startswith(("LDG", "LDC", "ULDC", "LDS")):
            return max(instruction.width // 4, 1)
        pair = any(part in opcode for part in (".WIDE", ".F64", ".64")) and not opcode.startswith("F2F.F32")
        return 2 if pair or opcode.startswith(("CS2R", "DADD", "DFMA", "DMUL")) else 1

    def _result(
        self, operation: str, form: list[str], sources: list[str], predicates: int, words: int
    ) -> Sequence[int | None]:
        """The words that an instruction writes, followed by its predicates, or nothing if they are not known."""
        if operation in ("LDC", "ULDC") and (match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", sources[0])):
            return [self._constant(int(match.group(1), 16) + 4 * word)[1] for word in range(words)]
        if operation in ("S2R", "S2UR", "CS2R"):
            return [0] * words
        if operation == "HFMA2":
            halves = sources[2:4]
            if sources[:2] != ["-RZ", "RZ"] or any(re.search("[A-Z]", half) for half in halves):
                return ()
            return [int.from_bytes(struct.pack(">2e", *map(float, halves)), "big")]  # a constant of two 16-bit halves
        if operation in ("SEL", "USEL"):
            chosen = self._predicate(sources[2])
            return () if chosen is None else [self._value(sources[1 - chosen])]
        lanes = [self._value(source) for source in sources]
        if operation in ("PLOP3", "UPLOP3"):  # the sources are predicates, and only the first result is computed
            bits = [bit for source in sources[:3] if (bit := self._predicate(source)) is not None]
            table = lanes[3]
            return () if len(bits) < 3 or table is None else [table >> (4 * bits[0] + 2 * bits[1] + bits[2]) & 1]
        carry = sum(value or 0 for value in map(self._predicate, sources[3:])) if "X" in form else 0
        given = lanes[:3]
        if None in given or (None in map(self._predicate, sources[3:]) and "X" in form):
            return ()
        a, b, c = (*(value or 0 for value in given), 0, 0, 0)[:3]
        if operation in ("MOV", "UMOV", "R2UR"):
            return [a]
        if operation in ("IADD3", "UIADD3", "VIADD"):
            total = carry + sum(self._addend(*pair) for pair in zip(sources[:3], (a, b, c), strict=False))
            return [total & _WORD, *[total >> 32 & 1] * min(predicates, 1)]
        if operation in ("IMAD", "UIMAD"):
            if "WIDE" in form or "HI" in form:
                if "U32" not in form:
                    a, b = _signed(a), _signed(b)
                upper = self._value(_next_register(sources[2])) if "WIDE" in form else 0
                if upper is None:
                    return ()
                total = a * b + (c | upper << 32)
                return [total >> 32 & _WORD] if "HI" in form else [total & _WORD, total >> 32 & _WORD]
            return [(a * b + c + carry) & _WORD]
        if operation in ("LEA", "ULEA"):
            if "SX32" in form:  # the upper word is the sign of the lower one
                high = _signed(a) << c >> 32
                return [high + b + (self._predicate(sources[3]) or 0) & _WORD]
            if "HI" in form:
                shift = lanes[3] or 0
                carry = (self._predicate(sources[4]) or 0) if "X" in form and len(sources) > 4 else 0
                total = ((a | c << 32) << shift >> 32 & _WORD) + b + carry
            else:
                total = (a << c & _WORD) + b
            return [total & _WORD, *[total >> 32 & 1] * min(predicates, 1)]
        if operation in ("SHF", "USHF"):
            pair, shift = c << 32 | a, b & 63
            if form[0] == "L":
                return [(pair << shift) >> 32 & _WORD if "HI" in form else a << shift & _WORD]
            if "S32" in form or "S64" in form:
                pair = pair - (1 << 64) if pair >> 63 else pair
            return [(pair >> 32 if "HI" in form else pair) >> shift & _WORD]
        if operation in ("LOP3", "ULOP3") and lanes[3] is not None:
            table = lanes[3]
            found = _logic(table, a, b, c)
            return [int(found != 0), found] if predicates else [found]
        if operation == "IABS":
            return [abs(_signed(a))]
        if operation == "I2F":
            return [_bits_of(float(a))]
        if operation == "MUFU" and form == ["RCP"] and 0 < a < 0x7F800000:
            return [_bits_of(1.0 / _float_of(a))]
        if operation == "F2I" and a < 0x4F800000:
            return [int(_float_of(a))]
        return ()

    def _predicate(self, source: str) -> int | None:
        guard = self._guard(source)
        return None if guard is None else int(guard)

    @staticmethod
    def _addend(source: str, value: int) -> int:
        """The value of an operand. A negated one is its complement plus one, which gives the carry of the hardware."""
        return (~-value & _WORD) + 1 if source.startswith("-") else value

    def _compare(self, form: str, operands: tuple[str, ...], certain: bool) -> None:
        """Note the result of a comparison such as ``ISETP.GE.U32.AND P0, PT, R1, R2, PT``.

        A comparison of upper halves, ``.EX``, also reads the predicate of the lower halves.
        """
        parts = form.split(".")
        target, first, second = operands[0], self._value(operands[2]), self._value(operands[3])
        other = self._predicate(operands[4]) if len(operands) > 4 else 1
        value: int | None = None
        if first is not None and second is not None:
            if "U32" not in parts:
                first, second = _signed(first), _signed(second)
            lower = self._predicate(operands[5]) if "EX" in parts and len(operands) > 5 else None
            compare = {
                "LT": first < second, "LE": first <= second, "GT": first > second, "GE": first >= second,
                "EQ": first == second, "NE": first != second,
            }  # fmt: skip
            if "EX" not in parts:
                value = int(compare[parts[0]])
            elif parts[0] in ("NE", "EQ"):
                if first != second:
                    value = int(parts[0] == "NE")
                elif lower is not None:
                    value = lower
            elif first != second:
                value = int(compare[parts[0]])
            elif lower is not None:
                value = lower
        if "AND" in parts:
            value = 0 if 0 in (value, other) else None if None in (value, other) else 1
        elif "OR" in parts:
            value = 1 if 1 in (value, other) else None if None in (value, other) else 0
        self.values[target] = value if certain else None
        if "PT" not in operands[1]:
            self.values[operands[1]] = None
