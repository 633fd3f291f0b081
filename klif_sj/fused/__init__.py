"""From a neuron's step to a fused multi-step kernel: trace -> source -> program -> kernel -> cuda | host -> op."""

from .backend import require_backend, serving_backend, supported_backends, unavailable
from .run import program_of, run

__all__ = ["program_of", "require_backend", "run", "serving_backend", "supported_backends", "unavailable"]
