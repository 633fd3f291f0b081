"""Fuse neurons when code calls them, without a change of the code."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import nn

from .._compat import steps
from ..neuron import FusedNode
from .convert import fuse
from .fuse_report import FuseReport, FuseRow
from .fused import Fused, own_class


class fusing:
    """Within the block, every neuron is fused when it is called for the first time.

    ``report`` lists the fused neurons, numbered in the order of their first calls. They keep their kernels after the
    block. Within ``torch.compile`` a neuron that was not called before runs as it is.
    """

    def __init__(self) -> None:
        self._rows: list[FuseRow] = []
        self._left_alone: dict[str, str] = {}

    @property
    def report(self) -> FuseReport:
        """The neurons that were fused so far. It has nothing to undo."""
        return FuseReport(tuple(self._rows), dict(self._left_alone))

    def __enter__(self) -> fusing:
        self._forward = base.MemoryModule.forward
        forward, tried = self._forward, self._try

        def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, Fused | FusedNode) and not torch.compiler.is_compiling():
                tried(self)
            return forward(self, *args, **kwargs)

        base.MemoryModule.forward = fused_forward
        return self

    def __exit__(self, *error: Any) -> None:
        base.MemoryModule.forward = self._forward

    def _try(self, node: nn.Module) -> None:
        if "_fused_tried" in vars(node) or not steps.is_neuron(type(node)):
            return
        path = f"#{len(self._rows) + len(self._left_alone) + 1}"
        try:
            (row,) = fuse(node).rows
        except ValueError as error:
            node.__dict__["_fused_tried"] = True
            self._left_alone[path] = str(error)
        else:
            self._rows.append(FuseRow((path,), own_class(node), row.states, row.parameters, row.note))
