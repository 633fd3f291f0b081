"""Kernels for the GPU: compiled by CuPy (NVRTC), cached by CuPy on disk, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import math
from contextlib import nullcontext
from typing import Any

import torch

from ..codegen.kernel import Kernel
from ..codegen.program import SEGMENT, Program
from .launch import Call
from .layout import Geometry
from .layout import empty as empty

OPTIONS = ("--std=c++17", "--fmad=false", "-default-device")
"""No fused multiply-adds, so that results are torch's own; division and square root are IEEE's by default. Unless
functions are the device's by default, NVRTC takes a lambda for host code."""

BLOCK = 128
"""Threads of a block."""

GRADIENT_BLOCKS = 24
"""Blocks for each multiprocessor of a kernel that sums gradients: each leaves partial sums behind."""

REGISTERS = {False: 150, True: 110}
"""Registers that a thread may spend on what :func:`_registers` counts, in the schedule without and with ``columns``; the
rest is for the arithmetic."""

UNROLLED = 32
"""Steps, over all its neighbours, that a backward thread unrolls at the most: twice as many forward, half as
many where several parameters have a value for every step."""


def require() -> None:
    """Check that CuPy and a GPU are there.

    :raises ImportError: without CuPy, with what to install
    :raises RuntimeError: without a GPU
    """
    toolkit = (torch.version.cuda or "13").split(".")[0]
    try:
        import cupy
    except Exception as error:
        raise ImportError(
            f"CuPy cannot be imported ({type(error).__name__}: {error}); install the one for torch's CUDA {toolkit}: "
            f"pip install cupy-cuda{toolkit}x"
        ) from error
    if not torch.cuda.is_available():
        raise RuntimeError(f"CuPy {cupy.__version__} is installed, but torch finds no CUDA GPU on this machine")


def segment(program: Program) -> int:
    """Steps that are walked at a time: fewer where several parameters with a value for each step are learned, as a
    thread holds the gradients of a segment's steps in registers.
    """
    stepwise = sum(p.per_step for p in program.learned)
    return SEGMENT if stepwise <= 1 else SEGMENT // 2 if stepwise == 2 else SEGMENT // 4


def source(kernel: Kernel, vector: int) -> str:
    """The kernel's CUDA source for threads that own ``vector`` neighbouring neurons."""
    steps = min(segment(kernel.program), kernel.steps)
    return kernel.source("cuda.cu", SEGMENT=steps, BLOCK=BLOCK, VECTOR=vector)


def vector_width(kernel: Kernel) -> int:
    """How many neighbours a thread owns where memory allows.

    16-bit storage moves up to 16 bytes at a time; wider storage keeps about 64 bytes in flight a thread, as several
    steps or as several neighbours. Both give way where a thread would need more registers than there are, or its
    unrolled code would take seconds to compile.
    """
    size, steps = kernel.dtype.itemsize, min(segment(kernel.program), kernel.steps)
    width = 16 // size
    most = UNROLLED // 2 if segment(kernel.program) < SEGMENT else UNROLLED if kernel.backward else 2 * UNROLLED
    if kernel.record:
        return 1  # recorded states are stored one by one, and so lie side by side
    while width > 1 and (width * steps > most or _registers(kernel, width) > REGISTERS[kernel.columns]):
        width //= 2
    return width


def _registers(kernel: Kernel, width: int) -> int:
    """A rough count for a thread: x and the gradients as they are moved, the states of every step, parameters and sums.

    With ``columns`` every neighbour has parameters and sums of its own.
    """
    steps, parameters = min(segment(kernel.program), kernel.steps), kernel.program.parameters
    moved = (1 + kernel.backward) * steps * width * kernel.dtype.itemsize // 4
    own = kernel.totals + kernel.stepwise * steps + sum(steps if p.per_step else 1 for p in parameters)
    return moved + kernel.backward * steps * (len(kernel.program.states) + 2) + own * (width if kernel.columns else 1)


def fitting_vector(kernel: Kernel, call: Call) -> int:
    """:func:`vector_width`, halved until every row starts on its boundary."""
    vector, geometry = vector_width(kernel), call.geometry
    strides = [t.stride(0) for t in (call.x, call.grad_spikes) if t is not None]
    strides += [geometry.neurons, geometry.channels if kernel.columns else geometry.inner]
    while vector > 1 and any(stride % vector for stride in strides):
        vector //= 2
    while vector > 1 and any(t.data_ptr() % min(16, vector * t.element_size()) for t in call.neuron_tensors()):
        vector //= 2
    return vector


def grid(kernel: Kernel, geometry: Geometry, vector: int, processors: int) -> tuple[int, int, int]:
    """Blocks, tiles or rows of each block, and blocks that share a channel.

    Blocks enough to fill the GPU several times over; where there are parameter gradients no more, so that few partial
    sums are written.
    """
    outer, channels, inner = geometry
    enough = processors * (GRADIENT_BLOCKS if kernel.grads else 64)
    if kernel.columns:
        wide = block_width(channels, vector)
        tall, across = BLOCK // wide, math.ceil(channels / (wide * vector))
        shares = min(math.ceil(outer / tall), max(enough // across, 1))
        rows = tall * math.ceil(math.ceil(outer / shares) / tall)
        shares = math.ceil(outer / rows)
        return shares * across, rows, shares
    tiles = math.ceil(outer * inner / (BLOCK * vector))
    rows = max(math.ceil(tiles * channels / enough), 1) if kernel.grads else 1
    shares = math.ceil(tiles / rows)
    return shares * channels, rows, shares


def block_width(channels: int, vector: int) -> int:
    """Threads of a block that lie side by side over channels, with ``columns``: as many as there is work for."""
    return min(1 << max(math.ceil(channels / vector) - 1, 0).bit_length(), 32)


def launch(kernel: Kernel, call: Call) -> None:
    """Run a kernel, and the second pass of its parameter gradients, on torch's current stream."""
    device, states = call.x.device, len(kernel.program.states)
    vector = fitting_vector(kernel, call)
    blocks, rows, shares = grid(kernel, call.geometry, vector, processors(device))
    if call.grad_parameters is None:
        submit(kernel, vector, "forward", blocks, call.pack(states, rows), device)
        return
    call.partial = call.grad_parameters.new_empty(shares * call.geometry.channels * kernel.grads)
    submit(kernel, vector, "backward", blocks, call.pack(states, rows), device)
    if kernel.grads:
        sums = kernel.grads * call.geometry.channels // call.neighbours
        submit(kernel, vector, "finish", sums, call.pack(states, shares), device)


def submit(kernel: Kernel, vector: int, name: str, blocks: int, block: bytes, device: torch.device) -> None:
    """Queue one kernel on torch's current stream of a device."""
    from cupy.cuda import driver

    elsewhere = torch.cuda.current_device() != device.index
    buffer = ctypes.create_string_buffer(block, len(block))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
    with torch.cuda.device(device) if elsewhere else nullcontext():
        function = _function(kernel, vector, name, device.index)
        stream = torch.cuda.current_stream().cuda_stream
        threads = BLOCK
        driver.launchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(parameters), 0)


@functools.lru_cache(maxsize=4096)
def _function(kernel: Kernel, vector: int, name: str, device: int) -> int:
    """The handle of a compiled function on a device."""
    return _module(kernel, vector, device).get_function(name).kernel.ptr


@functools.lru_cache(maxsize=2048)
def _module(kernel: Kernel, vector: int, device: int) -> Any:
    """Compile a kernel for a device.

    :raises RuntimeError: with NVRTC's log and the source, if it does not compile
    """
    import cupy

    text = source(kernel, vector)
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=text, options=OPTIONS, backend="nvrtc")
        try:
            module.compile()
        except cupy.cuda.compiler.CompileException as error:
            raise RuntimeError(f"NVRTC refused a generated kernel: {error}\n{_numbered(text)}") from error
    return module


def _numbered(text: str) -> str:
    return "\n".join(f"{number:4} {line}" for number, line in enumerate(text.splitlines(), 1))


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
