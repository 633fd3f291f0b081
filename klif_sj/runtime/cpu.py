"""Kernels for the CPU: compiled by the C++ compiler at hand, kept in the user's cache folder, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..codegen.kernel import Kernel
from ..codegen.program import SEGMENT, Program
from . import cache, layout, memory
from .cache import CompilerError as CompilerError
from .launch import Pass
from .memory import LARGE

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""No fused multiply-adds, so that results are torch's own; the other two change no value and let loops vectorise."""

LANES = 128
"""Neurons in a block. They are so few that a segment's rows and states fit the first-level cache."""

RUNS, LONGEST_RUN = 512, 16
"""A run of blocks shares a row of partial sums. There are ``RUNS`` runs or more if there are so many blocks, and no run
has more than ``LONGEST_RUN``."""

FOLD = 16
"""Lanes in which a partial sum of a parameter's gradient is kept, until the second pass adds them up."""

MANY_SUMS = 1 << 16
"""From this number on, partial sums lie in a tensor, which a count of memory sees. Fewer lie in plain memory, because
torch can take longer to make a tensor than a small layer runs."""

SERIAL_LIMIT = 1 << 15
"""Below this number of neurons times steps, waking other threads takes more time than it saves."""


def segment(program: Program) -> int:
    """Time steps in a segment, whose rows fit the first-level cache."""
    return SEGMENT


def compiler() -> tuple[str, ...]:
    """The C++ compiler's command: ``$CXX``, which may have several words (``ccache g++``), else g++, clang++ or c++.

    :raises CompilerError: if there is none
    """
    named = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(named)] if named else [["g++"], ["clang++"], ["c++"]]
    except ValueError as error:
        raise CompilerError(f"$CXX is no command ({error}): {named!r}") from error
    for name, *words in commands:
        if path := shutil.which(name):
            return (path, *words)
    raise CompilerError(
        f"no C++ compiler: $CXX names {named!r}, which is not found"
        if named
        else "no C++ compiler: none of g++, clang++, c++ is on the PATH; install one (for example `apt install g++`) "
        "or set $CXX"
    )


@functools.cache
def identity(command: tuple[str, ...]) -> str:
    """The compiler and the processor that it compiles for, which decide whether a compiled kernel can be used again."""
    programs = []
    for path in filter(None, map(shutil.which, command)):  # asking for the version would start a process
        file = os.stat(path)
        programs.append(f"{os.path.realpath(path)} {file.st_size} {file.st_mtime_ns}")
    return "\n".join((*command, *programs, platform.machine(), _processor()))


@functools.cache
def openmp(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """The OpenMP flags that the compiler accepts: for threads and simd, for simd alone, or none."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { int n = 0;\n#pragma omp parallel for\nfor (int i = 0; i < 2; i++) n = i;\n}\n")
        for flags in (("-fopenmp",), ("-fopenmp-simd",)):
            command = [*compiler, *flags, str(source), "-o", os.path.join(folder, "probe")]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return flags
    return ()


@functools.lru_cache(maxsize=1024)
def load(kernel: Kernel) -> Callable[[bytes], int]:
    """The kernel's function, which takes a packed ``Call`` and returns 0, or 1 if there was no memory.

    :raises CompilerError: with the compiler's log and the source's path
    """
    steps = min(segment(kernel.program), kernel.steps)
    constants = {"SEGMENT": steps, "LANES": LANES, "FOLD": FOLD, "LARGE": LARGE, "KEPT": kernel.program.kept}
    source = kernel.source("cpu.cpp", VALUES_OF_CHANNEL=kernel.values_of_channel, **constants)
    return function_of(source, "backward" if kernel.backward else "forward")


def function_of(source: str, name: str) -> Callable[[bytes], int]:
    """Compile a source, or find it compiled, and return one of its functions."""
    command = compiler()
    file = cache.file_name(".so", source, identity(command), *FLAGS, *ARITHMETIC)
    library = cache.built_file(file, lambda folder: _compile(source, command, folder, file))
    try:
        function = getattr(ctypes.CDLL(str(library)), name)
    except OSError as error:
        raise CompilerError(f"{command[0]} compiled a kernel that cannot be loaded: {error}") from error
    function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int
    return function


def _compile(source: str, command: tuple[str, ...], folder: Path, file: str) -> Path:
    text, built = folder / "kernel.cpp", folder / "kernel.so"
    text.write_text(source)
    result = subprocess.run(
        [*command, *FLAGS, *ARITHMETIC, *openmp(command), str(text), "-o", str(built)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        refused = folder.with_name(file).with_suffix(".failed.cpp")
        os.replace(text, refused)
        raise CompilerError(
            f"{shlex.join(command)} refused a generated kernel (exit status {result.returncode}).\n"
            f"Its source: {refused}\n{result.stderr}"
        )
    return built


@functools.cache
def _processor() -> str:
    """The processor, on which ``-march=native`` depends: machines with different ones may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def allocator(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    """A function that makes uninitialised tensors of one form. Large ones lie in the pool."""
    if math.prod(shape) * dtype.itemsize >= LARGE:
        return functools.partial(memory.empty, shape, strides, dtype)
    return layout.allocator(shape, strides, dtype, device)


def launch(work: Pass, record: list[Any]) -> None:
    """Run a kernel on the threads that torch uses; a small one on the calling thread alone.

    :raises MemoryError: if the system has no memory for what a launch needs besides its tensors
    """
    function, rows, sums, small = prepared(work)
    at = work.layout.at
    record[at.rows], record[at.sums] = rows, sums
    record[at.threads] = 1 if small or _forked else torch.get_num_threads()
    if sums >= MANY_SUMS:
        partial = torch.empty(sums, dtype=work.kernel.real)
        record[at.partial] = partial.data_ptr()
    if function(work.layout.pack(*record)):
        raise MemoryError("the system has no memory for a kernel's partial sums and parameters")


@functools.lru_cache(maxsize=1024)
def prepared(work: Pass) -> tuple[Callable[[bytes], int], int, int, bool]:
    """What kernel and shape alone decide about a launch: the function, how many blocks share a row of partial sums,
    how many partial sums there are in all, and whether other threads take more time than they save.
    """
    kernel, (outer, channels, inner) = work.kernel, work.geometry
    if kernel.channels_innermost:
        rows = max(math.ceil(outer / 64), 1)
        sums = math.ceil(outer / rows) * kernel.grads * channels
    else:
        blocks = outer * math.ceil(inner / LANES)  # for each channel
        rows = min(max(blocks * channels // RUNS, 1), LONGEST_RUN)
        sums = math.ceil(blocks / rows) * channels * kernel.grads * FOLD
    return load(kernel), rows, sums, work.geometry.neurons * kernel.steps < SERIAL_LIMIT


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# An OpenMP pool does not survive a fork: in a child, a parallel region would wait for threads that are not there.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
