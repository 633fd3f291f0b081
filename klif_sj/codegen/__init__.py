"""From one time step in Python to the text of a multi-step kernel: scope, trace -> emit -> program -> step, kernel."""

from .program import Parameter, Program
from .scope import Effective, Scope, note_methods
from .step import Equations, Kind, step_of
from .trace import StepTraceError

__all__ = [
    "Effective",
    "Equations",
    "Kind",
    "Parameter",
    "Program",
    "Scope",
    "StepTraceError",
    "note_methods",
    "step_of",
]
