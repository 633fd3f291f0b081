"""Published spiking neurons for SpikingJelly, with kernels generated from their own equations."""

from .fuse import check_fused, fuse
from .inspection import inspect
from .neuron import CLIFNode, FusedNode, GLIFNode, KLIFNode, state_contexts
from .optim import parameter_groups
from .surrogate import LearnableATan, Rect
from .swap import patched, swap_neurons

__version__ = "0.1.0"

__all__ = [
    "CLIFNode",
    "FusedNode",
    "GLIFNode",
    "KLIFNode",
    "LearnableATan",
    "Rect",
    "check_fused",
    "fuse",
    "inspect",
    "parameter_groups",
    "patched",
    "state_contexts",
    "swap_neurons",
]
