"""From one time step in Python to the text of a multi-step kernel: scope, trace -> emit -> program -> step, kernel."""

from .program import Parameter, Program
from .scope import Effective, Scope, note_methods
from .step import Equations, Kind, NeuronStep, step_of
from .trace import StepTraceError

__all__ = [
    "Effective",
    "Equations",
    "Kind",
    "NeuronStep",
    "Parameter",
    "Program",
    "Scope",
    "StepTraceError",
    "note_methods",
    "step_of",
]
