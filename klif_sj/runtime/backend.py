"""Decides which backend serves a call, and says why a named one cannot."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

BACKENDS = ("auto", "torch", "cpp", "cupy")
_DEVICE_OF = {"cpp": "cpu", "cupy": "cuda"}
_FUSED_ON = {device: backend for backend, device in _DEVICE_OF.items()}


@functools.cache
def unavailable(backend: str) -> Exception | None:
    """The reason why a backend cannot serve on this machine; None if it can."""
    try:
        if backend == "cpp":
            importlib.import_module("klif_sj.runtime.cpu").compiler()
        elif backend == "cupy":
            importlib.import_module("klif_sj.runtime.cuda").require()
    except Exception as error:
        return error
    return None


def supported_backends() -> tuple[str, ...]:
    """``'auto'`` and the backends that can serve on this machine."""
    return tuple(name for name in BACKENDS if can_serve(name))


def can_serve(backend: str) -> bool:
    """Whether a backend can serve on this machine. torch.compile takes the answer as a constant."""
    return unavailable(backend) is None


can_serve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_backend(backend: str) -> None:
    """Check that a backend's name is known, and that it can serve on this machine.

    :raises ValueError: for an unknown name
    :raises RuntimeError: for a backend that this machine cannot run, with the cause
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if cause := unavailable(backend):
        raise RuntimeError(
            f"backend {backend!r} cannot serve here: {cause}. backend='auto' takes the fastest that can"
        ) from cause


def serving_backend(backend: str, x: Tensor) -> str:
    """The backend that runs a call with this input: ``'torch'``, ``'cpp'`` or ``'cupy'``.

    It is ``'torch'`` in an export to ONNX and while one of SpikingJelly 2's operation counters is active, so that both
    see the operations of the neuron's equations. If another backend was named, a warning says that it is not used.

    :raises ValueError: if the named backend does not serve the input's device
    """
    device = x.device.type
    taken_apart = (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
    ) and _is_taken_apart()  # fmt: skip
    if backend == "auto":
        wanted = _FUSED_ON.get(device, "torch")
        return wanted if can_serve(wanted) and not taken_apart else "torch"
    if backend in _DEVICE_OF and device != _DEVICE_OF[backend]:
        raise ValueError(
            f"backend {backend!r}: expected a tensor on {_DEVICE_OF[backend]!r}, got one on {device!r}; move the "
            "input, or use backend='auto'"
        )
    if backend != "torch" and taken_apart:
        warnings.warn(
            f"backend {backend!r} does not serve an export to ONNX or a counter of operations, which know no fused "
            "kernel; backend 'torch' does, with the same equations. Use backend='auto' to choose so yourself",
            RuntimeWarning,
            stacklevel=2,
        )
        return "torch"
    return backend


def _is_taken_apart() -> bool:
    """Whether an export to ONNX or a counter needs the operations of the equations instead of a fused kernel."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return torch.onnx.is_in_onnx_export()
    modes = *_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()
    # These modes are SpikingJelly 2's counters and energy estimates, or derive from them.
    return any(cls.__module__.startswith("spikingjelly.") for mode in modes for cls in type(mode).__mro__)
