"""Compiles CUDA source with NVRTC, by CuPy's binding and with exactly the options that are given.

CuPy's own compiler would flush subnormal numbers, look for headers that no kernel includes, and repeat an option, which
NVRTC before 12.9 refuses.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from . import cache
from .cache import CompilerError


@functools.cache
def binding() -> Any:
    """CuPy's binding of NVRTC.

    :raises CompilerError: if CuPy is not there, or finds no NVRTC
    """
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        raise CompilerError(
            f"CuPy cannot use NVRTC ({type(error).__name__}: {error}); install the CuPy for your torch's CUDA, which "
            "brings NVRTC, or NVRTC itself: pip install nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for CUDA 12)"
        ) from error
    return nvrtc


def version() -> str:
    return ".".join(map(str, binding().getVersion()))


def target(architecture: int) -> str:
    """What NVRTC compiles to for an architecture (90 is compute capability 9.0): machine code if NVRTC knows the
    architecture. For a newer one it is PTX of the newest that NVRTC knows, which the driver translates.

    :raises CompilerError: for a GPU that is older than all that NVRTC knows
    """
    supported = binding().getSupportedArchs()
    if architecture in supported:
        return f"sm_{architecture}"
    older = [candidate for candidate in supported if candidate < architecture]
    if not older:
        raise CompilerError(
            f"expected a GPU of compute capability {min(supported) / 10} or newer for NVRTC {version()}, got one of "
            f"{architecture / 10}; install CuPy for an older CUDA"
        )
    return f"compute_{max(older)}"


def image(source: str, architecture: int, options: tuple[str, ...]) -> bytes:
    """Machine code or PTX, from the folder of compiled kernels if it is there."""
    options = (f"--gpu-architecture={target(architecture)}", *options)

    def build(folder: Path) -> Path:
        built = folder / "image"
        built.write_bytes(compiled(source, options))
        return built

    return cache.content(cache.built_file(cache.file_name(".cubin", source, version(), *options), build))


def compiled(source: str, options: tuple[str, ...]) -> bytes:
    """Compile to machine code for an architecture ``sm_*``, or to PTX for ``compute_*``.

    :raises CompilerError: with NVRTC's log and the numbered source, if it does not compile
    """
    nvrtc = binding()
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        if any("=compute_" in option for option in options):
            ptx: bytes = nvrtc.getPTX(program)
            return ptx
        return nvrtc.getCUBIN(program) + b"\0"  # the binding drops the last byte as a string's end
    except nvrtc.NVRTCError as error:
        numbered = "\n".join(f"{number:4} {line}" for number, line in enumerate(source.splitlines(), 1))
        raise CompilerError(
            f"NVRTC {version()} refused a generated kernel ({error}), options {' '.join(options)}.\n"
            f"{nvrtc.getProgramLog(program)}\n{numbered}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
