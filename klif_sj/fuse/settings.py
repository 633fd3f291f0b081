"""The settings of a neuron that runs on kernels, which is one of ours or a fused one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .. import runtime
from ..neuron import FusedNode
from .fused import Fused


def serving_backend(neuron: nn.Module, x: Tensor) -> str | None:
    """The backend of this package that serves a neuron's call; None if SpikingJelly's or the user's own code does.

    :param x: an input on the call's device
    """
    if isinstance(neuron, FusedNode):
        return runtime.serving_backend(neuron.backend, x)
    if isinstance(neuron, Fused):
        serving = runtime.serving_backend(neuron._fused_backend, x)
        return None if serving == "torch" else serving
    return None


@contextmanager
def states_kept(net: nn.Module) -> Iterator[None]:
    """Within the block, all neurons of a network keep their final states, also those with ``keep_state=False``."""
    names = ((FusedNode, "keep_state"), (Fused, "_fused_keep_state"))
    sparing = [
        (module, name) for module in net.modules() for cls, name in names
        if isinstance(module, cls) and not getattr(module, name)
    ]  # fmt: skip
    for module, name in sparing:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name in sparing:
            setattr(module, name, False)
