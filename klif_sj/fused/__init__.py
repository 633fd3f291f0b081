"""From a neuron's step to a fused multi-step kernel: trace -> source -> cuda | host -> op."""

from .backend import require_backend, run, serving_backend, supported_backends

__all__ = ["require_backend", "run", "serving_backend", "supported_backends"]
