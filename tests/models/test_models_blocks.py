"""The residual blocks of the papers' networks, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj.models.blocks import ResidualBlock
from klif_sj.models.resnet import basic_block, preact_block, threshold_block


class Sign(nn.Module):
    """In a neuron's place: tells nothing of the scale of its input, and everything of its sign."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x)


def normalised(x: Tensor, scale: float = 1.0) -> Tensor:
    """Batch normalisation over time, batch and image with its initial shift, from the definition."""
    mean = x.mean((0, 1, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 1, 3, 4), keepdim=True)
    return scale * (x - mean) / torch.sqrt(variance + 1e-5)


def convolved(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    return torch.stack([F.conv2d(step, weight, stride=stride, padding=weight.shape[-1] // 2) for step in x])


def block_input(block: ResidualBlock) -> Tensor:
    block.double()
    return (torch.rand(3, 2, 4, 6, 6) < 0.4).double()


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 2)])
def test_basic_block_normalises_both_branches(channels: int, stride: int) -> None:
    block = basic_block(Sign, 4, channels, stride)
    x = block_input(block)
    inner = (normalised(convolved(x, block.body.conv1.weight, stride)) > 0).double()
    branch = normalised(convolved(inner, block.body.conv2.weight))
    shortcut = x if stride == 1 else normalised(convolved(x, block.shortcut.conv.weight, stride))
    assert_equal(block(x), (branch + shortcut > 0).double(), "spikes")


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 2)])
def test_preact_block_normalises_the_sum(channels: int, stride: int) -> None:
    block = preact_block(Sign, 4, channels, stride)
    x = block_input(block)
    inner = (normalised(convolved(x, block.body.conv1.weight, stride)) > 0).double()
    shortcut = x if stride == 1 else convolved(x, block.shortcut.weight, stride)
    summed = convolved(inner, block.body.conv2.weight) + shortcut
    assert_equal(block(x), (normalised(summed) > 0).double(), "spikes")


class Probe(Sign):
    """A neuron with a threshold, that keeps its current."""

    v_threshold = 0.6

    def forward(self, x: Tensor) -> Tensor:
        self.current = x
        return super().forward(x)


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 1), (6, 2)])
def test_threshold_block_normalises_to_the_threshold(channels: int, stride: int) -> None:
    block = threshold_block(Probe, 4, channels, stride)
    x = block_input(block)
    spikes = block(x)
    # The weights are made in single precision.
    threshold, share = torch.tensor([0.6, 0.6 / math.sqrt(2)]).tolist()
    inner = normalised(convolved(x, block.body.conv1.weight, stride), threshold)
    assert_close(block.body.neuron.current, inner, "inner current")
    branch = normalised(convolved((inner > 0).double(), block.body.conv2.weight), share)
    shortcut = x if channels == 4 else convolved(x, block.shortcut.conv.weight, stride)
    current = branch + normalised(shortcut, share)
    assert_close(block.neuron.current, current, "current")
    assert spikes.shape == (3, 2, channels, 6 // stride, 6 // stride)
