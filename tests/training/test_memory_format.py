"""Images stay contiguous where oneDNN cannot take their channels innermost."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from spikingjelly.activation_based import layer
from torch import nn

from klif_sj.training.memory_format import narrow_convolutions
from klif_sj.training.recipe import load_recipe
from klif_sj.training.run import SpikingClassifier, network_of

AFFECTED = ["klif-resnet18", "klif-resnet18-coding", "clif-cifar10", "clif-cifar100"]
"""Recipes whose networks have narrow convolutions at a sixteenth of their width."""


@pytest.mark.parametrize(
    ("convolution", "expected"),
    [
        (nn.Conv2d(4, 16, 1, stride=2), True),
        (nn.Conv2d(7, 7, 1, stride=2, bias=False), True),
        (nn.Conv2d(2, 64, 1, stride=3), True),
        (nn.Conv2d(4, 16, 1, stride=(1, 2)), True),
        (layer.Conv2d(4, 16, kernel_size=1, stride=2, step_mode="m"), True),
        (nn.Conv2d(8, 16, 1, stride=2), False),
        (nn.Conv2d(4, 16, 1), False),
        (nn.Conv2d(4, 16, 3, stride=2), False),
        (nn.Conv2d(4, 16, (1, 3), stride=2), False),
        (nn.Conv2d(4, 16, 1, stride=2, groups=2), False),
        (nn.Conv1d(4, 16, 1, stride=2), False),
    ],
    ids=repr,
)
def test_narrow_convolutions_are_found(convolution: nn.Module, expected: bool) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(nn.Identity(), convolution))
    assert narrow_convolutions(net) == (["1.1"] if expected else [])


@pytest.mark.parametrize(("width", "narrow"), [(1 / 16, True), (1 / 8, False)])
@pytest.mark.parametrize("name", AFFECTED)
def test_a_narrow_network_stays_contiguous_and_says_so(
    name: str, width: float, narrow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(name).override(width=width, backend="torch")
    with caplog.at_level(logging.WARNING, logger="klif_sj"):
        module = SpikingClassifier(network_of(recipe), recipe)
    assert module.channels_last is not narrow
    weights = [conv.weight for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    assert all(weight.is_contiguous() for weight in weights) is narrow
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == narrow
    assert all("stays contiguous" in line and "block3.shortcut" in line for line in said)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_come_in_the_networks_format(channels_last: bool) -> None:
    recipe = load_recipe("klif-resnet18").override(width=1 / 8, time_steps=2, channels_last=channels_last)
    module, found = SpikingClassifier(network_of(recipe), recipe).eval(), []
    convolution = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    images = torch.rand(2, *module.net.input_shape)
    for given in (images, images.to(memory_format=torch.channels_last), images.flip(0).transpose(2, 3)):
        module(given)
    for image in found:
        assert image.is_contiguous(memory_format=torch.channels_last) is channels_last
        assert image.is_contiguous() is not channels_last


STEPS = """
import sys, torch
from klif_sj.training.recipe import load_recipe
from klif_sj.training.run import SpikingClassifier, network_of

for name in sys.argv[1:]:
    recipe = load_recipe(name).override(width=1 / 16, time_steps=4, backend="torch")
    module = SpikingClassifier(network_of(recipe), recipe)
    # As of a data set whose channels are innermost.
    images, labels = torch.rand(4, *module.net.input_shape).to(memory_format=torch.channels_last), torch.arange(4)
    module.loss(module(images), labels).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    print(name)
"""


@pytest.mark.once
def test_affected_recipes_train_on_processors_without_avx512() -> None:
    """The flag makes oneDNN take such a processor's paths on any x86-64. It is read when torch is imported."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", STEPS, *AFFECTED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == AFFECTED
