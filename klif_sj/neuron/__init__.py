"""The neurons: one file each, its equations in plain torch."""

from .base import FusedNode
from .klif import KLIFNode

__all__ = ["FusedNode", "KLIFNode"]
