"""From a neuron's step to a fused multi-step kernel: trace -> source -> cuda | host -> op."""

from .backend import program_of, require_backend, run, serving_backend, supported_backends, unavailable

__all__ = ["program_of", "require_backend", "run", "serving_backend", "supported_backends", "unavailable"]
