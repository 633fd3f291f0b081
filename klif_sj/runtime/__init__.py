"""Runs a program over a sequence: backend -> autograd (form), op -> scan -> launch -> cpu | cuda."""

from __future__ import annotations

import torch

from ..codegen.program import Program
from .autograd import NO_TRANSFORMS, Call, Results, as_it_is_now, run
from .backend import require_backend, serving_backend, supported_backends, unavailable
from .launch import PLAIN

__all__ = [
    "NO_TRANSFORMS",
    "PLAIN",
    "Call",
    "Results",
    "as_it_is_now",
    "cuda_source",
    "require_backend",
    "run",
    "serving_backend",
    "supported_backends",
    "unavailable",
]


def cuda_source(program: Program, steps: int, dtype: torch.dtype) -> str:
    """The CUDA C++ that a program is trained with on a GPU, for sequences of ``steps`` in a storage dtype."""
    from ..codegen.kernel import Kernel
    from . import cuda

    kernel = Kernel(program, steps, dtype, channels_innermost=False, record=False, backward=True)
    return cuda.source(kernel, cuda.vector_width(kernel))
