"""Find out whether a network can take images with their channels innermost."""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

__all__ = ["channels_last_is_safe", "narrow_convolutions"]

log = logging.getLogger(__name__)


def channels_last_is_safe(net: nn.Module) -> bool:
    """Whether the network has no :func:`narrow_convolutions`; logs them otherwise."""
    narrow = narrow_convolutions(net)
    if narrow:
        rank_zero_only(log.warning)(
            "The network stays contiguous, though channels_last is set: of channels_last images, torch's oneDNN "
            "corrupts memory in the backward pass of 1 x 1 convolutions with a stride and fewer than 8 input channels "
            "(%s).",
            ", ".join(narrow),
        )
    return not narrow


def narrow_convolutions(net: nn.Module) -> list[str]:
    """The names of the network's 1 x 1 convolutions with a stride and fewer than 8 input channels.

    On a CPU without AVX-512, the backward pass of such a convolution of channels_last images in float32 writes outside
    of oneDNN's buffers. Contiguous images are safe, and so are 8 channels and more, groups, and any other size of the
    kernel. The answer does not depend on the processor, so that a recipe trains alike everywhere.
    """
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.groups == 1
        and module.in_channels < 8
    ]
