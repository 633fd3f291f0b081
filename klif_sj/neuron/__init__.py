"""The neurons: one file each, its equations in plain torch."""

from .base import FusedNode
from .clif import CLIFNode
from .glif import GLIFNode
from .klif import KLIFNode

__all__ = ["CLIFNode", "FusedNode", "GLIFNode", "KLIFNode"]
