"""From one time step in Python to the text of a multi-step kernel: scope, trace -> emit -> program -> step, kernel."""

from .program import Parameter, Program
from .scope import Effective
from .step import Kind, Sources, sources_of, step_of
from .trace import StepTraceError, is_tracing

__all__ = [
    "Effective",
    "Kind",
    "Parameter",
    "Program",
    "Sources",
    "StepTraceError",
    "is_tracing",
    "sources_of",
    "step_of",
]
