"""Inspect what a spiking network does, and why it does not learn (:func:`inspect`)."""

from .findings import Finding, Thresholds
from .inspector import inspect
from .learned import LearnedParameter
from .operations import Operations
from .result import Comparison, Inspection, LayerInspection, Potential

__all__ = [
    "Comparison",
    "Finding",
    "Inspection",
    "LayerInspection",
    "LearnedParameter",
    "Operations",
    "Potential",
    "Thresholds",
    "inspect",
]
