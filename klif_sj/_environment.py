"""The environment report that a bug report needs."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from importlib import metadata
from typing import Any

import torch

from . import __version__, _compat, runtime

__all__ = ["environment"]

PACKAGES = ("torch", "spikingjelly", "triton", "lightning", "torchvision", "torchaudio", "scikit-learn", "matplotlib")


def environment() -> dict[str, str]:
    """What is installed and which backends can serve here: texts by label."""
    report = {
        "klif_sj": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": " ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch",
    }
    report.update((name, _version(name)) for name in PACKAGES)
    report["spikingjelly"] += f" (handled as the {_compat.LINE} line)"
    report["cupy"] = _cupy()
    report["cuda"] = _cuda()
    report["gpu"] = _gpus()
    report["compiler"] = _compiler()
    report.update((f"backend {name}", _backend(name)) for name in ("torch", "cpp", "cupy"))
    return report


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cupy() -> str:
    """The version that the module itself tells, as the names of CuPy's distributions contain a CUDA version."""
    try:
        import cupy
    except Exception as error:  # a broken CuPy raises errors of many kinds
        return _first_line(error)
    return cupy.__version__


def _cuda() -> str:
    return f"torch built for {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "; ".join(
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus
    )


def _compiler() -> str:
    from .runtime import cpu

    try:
        command = cpu.compiler()
        completed = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, cpu.CompilerError) as error:
        return _first_line(error)
    return f"{shlex.join(command)}: {completed.stdout.splitlines()[0]}"


def _backend(name: str) -> str:
    cause = runtime.unavailable(name)
    return "can serve" if cause is None else f"cannot serve: {_first_line(cause)}"


def _first_line(error: BaseException) -> str:
    text: Any = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
