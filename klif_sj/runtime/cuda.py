"""Kernels for the GPU: compiled by NVRTC, kept in the user's cache folder, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
from typing import Any

import torch

from ..codegen.kernel import Kernel
from ..codegen.program import SEGMENT, Program
from . import nvrtc
from .launch import Pass
from .layout import Geometry
from .layout import allocator as allocator

OPTIONS = ("--std=c++17", "--fmad=false", "-default-device")
"""There are no fused multiply-adds, so that results are torch's own; division and square root are IEEE's by default.
Without ``-default-device``, NVRTC takes a lambda for host code."""

BLOCK = 128
"""Threads in a block."""

GRADIENT_BLOCKS = {False: 24, True: 6}
"""Blocks for each multiprocessor in a kernel that sums gradients, by whether channels are innermost. Each block writes
partial sums; they are of many channels if channels are innermost, so there are fewer blocks then.
"""

REGISTERS = {"contiguous": 190, "channels innermost, forward": 175, "channels innermost, backward": 116}
"""Registers that a thread may spend on what :func:`_registers` counts, by schedule; the rest is for the arithmetic."""

UNROLLED = 128
"""The most steps that a thread unrolls, counted over all its neighbours. It unrolls half as many backward or if a step
computes an exponential or the like, a quarter backward with several states, and an eighth with several learned per-step
parameters."""


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
    """Time steps in a segment. There are fewer if several parameters with a value for each step are learned, because a
    thread holds their gradients for all steps of a segment in registers, of which a float64 takes two.
    """
    per_step = sum(p.per_step for p in program.learned) * (2 if program.dtype == "float64" else 1)
    return SEGMENT if per_step <= 1 else SEGMENT // 2 if per_step == 2 else SEGMENT // 4


def source(kernel: Kernel, vector: int) -> str:
    """The kernel's CUDA source for threads that own ``vector`` neighbouring neurons."""
    steps = min(segment(kernel.program), kernel.steps)
    return kernel.source("cuda.cu", SEGMENT=steps, BLOCK=BLOCK, VECTOR=vector)


@functools.lru_cache(maxsize=4096)
def vector_width(kernel: Kernel) -> int:
    """How many neighbouring neurons a thread owns if addresses and strides allow it.

    It owns as many as 16 bytes hold. It owns fewer if it would need more registers than there are, or if its unrolled
    code would take seconds to compile. If states are recorded, it owns one: a thread stores a state neuron by neuron,
    and the stores of neighbouring threads then lie side by side.
    """
    if kernel.record:
        return 1
    steps, width = min(segment(kernel.program), kernel.steps), 16 // kernel.dtype.itemsize
    most = UNROLLED
    if kernel.backward or kernel.program.costly:
        most = UNROLLED // 4 if kernel.backward and len(kernel.program.states) > 1 else UNROLLED // 2
    if segment(kernel.program) < SEGMENT:
        most = UNROLLED // 8
    schedule = "contiguous"
    if kernel.channels_innermost:
        schedule = f"channels innermost, {'backward' if kernel.backward else 'forward'}"
    while width > 1 and (width * steps > most or _registers(kernel, width) > REGISTERS[schedule]):
        width //= 2
    return width


def _registers(kernel: Kernel, width: int) -> int:
    """A rough count of a thread's registers. They hold x and the gradients as they are moved, the current step,
    parameters and sums, and, backward, the states of every step.

    If channels are innermost, every neighbour has parameters and sums of its own.
    """
    steps, parameters = min(segment(kernel.program), kernel.steps), kernel.program.parameters
    moved = (1 + kernel.backward) * steps * width * kernel.dtype.itemsize // 4
    per_channel = (
        kernel.summed_grads + kernel.per_step_grads * steps + sum(steps if p.per_step else 1 for p in parameters)
    )
    numbers = width * (len(kernel.program.states) + 2) + per_channel * (width if kernel.channels_innermost else 1)
    numbers += kernel.backward * steps * (len(kernel.program.states) + 2)
    return moved + numbers * (2 if kernel.program.dtype == "float64" else 1)


def fitting_vector(work: Pass, record: list[Any]) -> int:
    """:func:`vector_width`, halved until every row is aligned to a vector."""
    kernel, geometry, at = work.kernel, work.geometry, work.layout.at
    vector = vector_width(kernel)
    rows = geometry.neurons | (geometry.channels if kernel.channels_innermost else geometry.inner)
    rows |= record[at.x_stride] | record[at.grad_spikes_stride]
    while vector > 1 and rows % vector:
        vector //= 2
    addresses = work.layout.by_neuron(record)
    if functools.reduce(operator.or_, addresses) % 16:  # mostly all are aligned
        io, real = kernel.dtype.itemsize, kernel.real.itemsize
        sizes = [io if stored else real for stored in work.layout.in_storage]
        while vector > 1 and any(a % min(16, vector * size) for a, size in zip(addresses, sizes, strict=True)):
            vector //= 2
    return vector


@functools.lru_cache(maxsize=4096)
def grid(kernel: Kernel, geometry: Geometry, vector: int, processors: int) -> tuple[int, int, int]:
    """How many blocks there are, how many tiles or rows each block has, and how many blocks share a channel.

    There are enough blocks to fill the GPU several times over. If there are parameter gradients, there are no more
    than that, so that few partial sums are written.
    """
    outer, channels, inner = geometry
    enough = processors * (GRADIENT_BLOCKS[kernel.channels_innermost] if kernel.grads else 64)
    if kernel.channels_innermost:
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
    """How many threads of a block lie side by side over innermost channels: as many as have work, at most 32."""
    return min(1 << max(math.ceil(channels / vector) - 1, 0).bit_length(), 32)


def launch(work: Pass, record: list[Any]) -> None:
    """Run a kernel, and the second pass of its parameter gradients, on torch's current stream."""
    kernel, geometry, device, at, pack = (
        work.kernel,
        work.geometry,
        work.device,
        work.layout.at,
        work.layout.pack,
    )
    vector = fitting_vector(work, record)
    blocks, record[at.rows], shares = grid(kernel, geometry, vector, processors(device))
    if size := kernel.prepared_values(work.channels):
        prepared = torch.empty(size, dtype=kernel.real, device=device)
        record[at.prepared] = prepared.data_ptr()
        preparing, rows = math.ceil(size / BLOCK), record[at.rows]
        record[at.rows] = preparing
        submit(kernel, vector, "prepare", preparing, pack(*record), device)
        record[at.rows] = rows
    if not kernel.backward:
        submit(kernel, vector, "forward", blocks, pack(*record), device)
        return
    partial = torch.empty(shares * geometry.channels * kernel.grads, dtype=kernel.real, device=device)
    record[at.partial] = partial.data_ptr()
    submit(kernel, vector, "backward", blocks, pack(*record), device)
    if kernel.grads:
        record[at.rows] = shares
        submit(kernel, vector, "finish", kernel.grads * work.channels, pack(*record), device)


def submit(kernel: Kernel, vector: int, name: str, blocks: int, call: bytes, device: torch.device) -> None:
    """Queue one kernel on torch's current stream of a device."""
    index = device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return submit(kernel, vector, name, blocks, call, device)
    driver = _driver()
    if not driver.ctxGetCurrent():
        _make_context()
    function = _function(kernel, vector, name, index)
    argument = (ctypes.c_char_p * 1)(call)  # an array of pointers to the arguments
    stream, threads = torch._C._cuda_getCurrentRawStream(index), BLOCK
    driver.launchKernel(function.ptr, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(argument), 0)


@functools.cache
def _driver() -> Any:
    from cupy.cuda import driver

    return driver


def _make_context() -> None:
    """Give this thread a context of the GPU: a call of the runtime makes one, a call of the driver does not."""
    from cupy.cuda import runtime

    runtime.memGetInfo()


# Modules are kept for good: a captured graph may launch their functions at any time.
@functools.cache
def _function(kernel: Kernel, vector: int, name: str, device: int) -> Any:
    """A compiled function on a device."""
    return _module(kernel, vector, device).get_function(name)


@functools.cache
def _module(kernel: Kernel, vector: int, device: int) -> Any:
    """A compiled kernel, loaded on a device, which is the current one.

    :raises RuntimeError: while a CUDA graph is captured, or with NVRTC's log and the source, if it does not compile
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.program.neuron}: its {'backward' if kernel.backward else 'forward'} kernel for {kernel.steps} "
            "steps is not loaded yet, and a CUDA graph cannot capture that; before the capture, run once what is to be "
            "captured, with tensors of the same shapes, layouts and alignment"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return _loaded(nvrtc.image(source(kernel, vector), 10 * major + minor, OPTIONS))


def _loaded(image: bytes) -> Any:
    from cupy.cuda.function import Module

    module = Module()
    module.load(image)
    return module


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
