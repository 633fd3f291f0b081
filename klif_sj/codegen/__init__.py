"""From one time step in Python to the text of a multi-step kernel: scope, trace -> emit -> program -> step, kernel."""

from .program import Parameter, Program
from .scope import Effective, Scope, note_methods
from .step import (
    Computation,
    EffectiveParameters,
    Equations,
    Find,
    Kind,
    NeuronStep,
    PerStep,
    Sources,
    sources_of,
    step_of,
)
from .trace import StepTraceError, is_tracing

__all__ = [
    "Computation",
    "Effective",
    "EffectiveParameters",
    "Equations",
    "Find",
    "Kind",
    "NeuronStep",
    "Parameter",
    "PerStep",
    "Program",
    "Scope",
    "Sources",
    "StepTraceError",
    "is_tracing",
    "note_methods",
    "sources_of",
    "step_of",
]
