"""Run any SpikingJelly neuron on generated kernels (:func:`fuse`), and check that it computes the same."""

from .automatic import fusing
from .check import check_fused
from .convert import fuse
from .fuse_report import FuseReport, FuseRow
from .fused import own_class
from .settings import serving_backend, states_kept

__all__ = [
    "FuseReport",
    "FuseRow",
    "check_fused",
    "fuse",
    "fusing",
    "own_class",
    "serving_backend",
    "states_kept",
]
