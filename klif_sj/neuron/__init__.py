"""The neurons: one file each, its equations in plain torch."""

from .base import FusedNode
from .checkpointing import state_contexts
from .clif import CLIFNode
from .glif import GLIFNode
from .klif import KLIFNode

__all__ = ["CLIFNode", "FusedNode", "GLIFNode", "KLIFNode", "state_contexts"]
