"""From a step to a fused multi-step kernel: backend, dispatch -> op -> scan -> cpu | cuda."""

from .backend import require_backend, serving_backend, supported_backends, unavailable
from .dispatch import cuda_source, program_of, run

__all__ = [
    "cuda_source",
    "program_of",
    "require_backend",
    "run",
    "serving_backend",
    "supported_backends",
    "unavailable",
]
