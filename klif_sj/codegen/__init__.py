"""From one time step in Python to the text of a multi-step kernel: scope, trace -> emit -> program -> step, kernel."""

from .program import Parameter, Program
from .scope import Effective
from .step import Kind, step_of
from .trace import StepTraceError

__all__ = ["Effective", "Kind", "Parameter", "Program", "StepTraceError", "step_of"]
