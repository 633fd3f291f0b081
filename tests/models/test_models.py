"""The papers' networks: their layers, parameters, gradients, and what of a static image is computed once."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from tolerance import assert_close
from torch import nn

from klif_sj import GLIFNode, KLIFNode
from klif_sj.models import (
    NETWORKS,
    NEURONS,
    SpikingNetwork,
    build_network,
    mnist_network,
    neuron_factory,
    spiking_layers,
)

STEPS = 3
CIFAR = {"in_channels": 3, "image_size": 32, "classes": 10}

VARIANTS = [
    *(pytest.param(name, {}, id=name) for name in NETWORKS),
    *(pytest.param(name, {"coding": True}, id=f"{name}-coding") for name in ("vgg16", "resnet18")),
]
each_network = pytest.mark.parametrize(("name", "options"), VARIANTS)


def tiny(name: str, neuron: str = "klif", **options: Any) -> SpikingNetwork:
    """The network at a sixteenth of its width, whose weights do not depend on the test's other random numbers."""
    torch.manual_seed(4)
    factory = neuron_factory(neuron, STEPS, "torch")
    return build_network(name, factory, STEPS, **({**CIFAR, "width": 1 / 16} | options))


def lively(name: str, **options: Any) -> SpikingNetwork:
    """A tiny network for evaluation that fires up to its outputs, though its normalisation has not seen data yet."""
    torch.manual_seed(4)
    neuron = partial(KLIFNode, v_threshold=0.03, backend="torch")
    network = build_network(name, neuron, STEPS, **CIFAR, width=1 / 16, **options).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return network


def full_size(name: str, neuron: str = "lif", **options: Any) -> SpikingNetwork:
    """The network at its published width, without memory for its weights."""
    with torch.device("meta"):
        return build_network(name, neuron_factory(neuron, STEPS, "torch"), STEPS, **(CIFAR | options))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def conv(in_channels: int, *channels: int, size: int = 3) -> int:
    """Parameters of 3x3 convolutions in a row, each with its batch normalisation."""
    pairs = zip((in_channels, *channels), channels, strict=False)
    return sum(size**2 * before * after + 2 * after for before, after in pairs)


# Outputs and inputs.


@each_network
def test_a_static_image_is_a_sequence_of_equal_frames(name: str, options: dict[str, Any]) -> None:
    network = lively(name, **options)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        by_step = network.outputs_by_step(torch.stack([images] * STEPS))
        functional.reset_net(network)
        answer = network(images)
    assert by_step.shape == (STEPS, 2, 10)
    assert by_step.std() > 0
    assert_close(answer, by_step.mean(0), "the mean of the outputs of the steps")


@each_network
def test_the_first_convolution_and_normalisation_see_a_static_image_once(name: str, options: dict[str, Any]) -> None:
    network = tiny(name, **options)
    images: Counter[str] = Counter()
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, output, path=path: images.update({path: math.prod(inputs[0].shape[:-3])})
            )
    network(torch.rand(3, 3, 32, 32))
    convolutions = 3 if name.startswith("klif") or options else 1
    first = {f"encoder.convolutions.{number}": 3 for number in range(convolutions)} | {"encoder.norm": 3}
    assert {path: seen for path, seen in images.items() if path.startswith("encoder")} == first
    later = {seen for path, seen in images.items() if not path.startswith("encoder")}
    assert later == {3 * STEPS}


def test_frames_are_as_many_steps_as_there_are() -> None:
    network = tiny("klif-dvs-gesture", in_channels=2, classes=11)
    assert network.outputs_by_step((torch.rand(6, 2, 2, 32, 32) < 0.1).float()).shape == (6, 2, 11)


def test_images_without_batch_or_of_another_size_are_refused() -> None:
    network = tiny("resnet18")
    expected = r"expected images \[N, 3, 32, 32\] or frames \[T, N, 3, 32, 32\], got shape "
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 28, 28), (1, 2, 3, 4, 32)):
        with pytest.raises(ValueError, match=expected + rf"\({', '.join(map(str, shape))}\)"):
            network(torch.rand(shape))


# Parameters.


TABLE_1 = {
    "klif-mnist": {"in_channels": 1, "image_size": 28, "classes": 10},
    "klif-cifar10": CIFAR,
    "klif-cifar10-dvs": {"in_channels": 2, "image_size": 128, "classes": 10},
    "klif-dvs-gesture": {"in_channels": 2, "image_size": 128, "classes": 11},
}
TABLE_1_PARAMETERS = {
    "klif-mnist": conv(128, 128) + 128 * 14**2 * 2048 + 2048 * 100,
    "klif-cifar10": conv(128, *[256] * 6) + 256 * 8**2 * 2048 + 2048 * 100,
    "klif-cifar10-dvs": conv(128, *[128] * 3) + 128 * 16**2 * 512 + 512 * 100,
    "klif-dvs-gesture": conv(128, *[128] * 4) + 128 * 8**2 * 512 + 512 * 110,
}
TABLE_1_NOTATION = {
    "klif-mnist": "(128C3+128C3+128C3)(enc)-128C3-MP2-2048FC-(100FC-AP10)(dec)",
    "klif-cifar10": "(128C3+128C3+128C3)(enc)-(256C3-256C3-256C3-MP2)*2-2048FC-(100FC-AP10)(dec)",
    "klif-cifar10-dvs": "(128C3+128C3+128C3)(enc)-(128C3-MP2)*3-512FC-(100FC-AP10)(dec)",
    "klif-dvs-gesture": "(128C3+128C3+128C3)(enc)-(128C3-MP2)*4-512FC-(110FC-AP10)(dec)",
}


@pytest.mark.parametrize("name", TABLE_1)
def test_networks_of_table_1(name: str) -> None:
    network = full_size(name, **TABLE_1[name])
    encoder = 3 * 9 * TABLE_1[name]["in_channels"] * 128 + 2 * 128
    assert parameters(network) == encoder + TABLE_1_PARAMETERS[name]
    assert network.notation == TABLE_1_NOTATION[name]
    klif = full_size(name, "klif", **TABLE_1[name])
    assert parameters(klif) == parameters(network) + len(spiking_layers(klif)), "one k a layer"


VGG16 = conv(64, 64, 128, 128, *[256] * 3, *[512] * 6)
RESNET18 = sum(
    conv(before, after) + 3 * conv(after, after) + (conv(before, after, size=1) if before != after else 0)
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512))
)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vgg16", {}, conv(3, 64) + VGG16 + 512 * 10 + 10),
        ("vgg16", {"coding": True}, 3 * 27 * 64 + 128 + VGG16 + 512 * 100),
        ("resnet18", {}, conv(3, 64) + RESNET18 + 512 * 10 + 10),
        ("resnet18", {"coding": True}, 3 * 27 * 64 + 128 + RESNET18 + 512 * 100),
        ("vgg11", {}, conv(3, 64, 128, *[256] * 2, *[512] * 4) + 512 * 7**2 * 10 + 10),
    ],
)
def test_parameters_of_ablation_and_vgg11(name: str, options: dict[str, Any], expected: int) -> None:
    assert parameters(full_size(name, **options)) == expected


def test_parameters_of_the_usual_cifar_networks() -> None:
    """Known counts of the same networks without spikes, for CIFAR-10."""
    assert parameters(full_size("resnet18")) == 11_173_962
    # There, a last normalisation is missing, which the CLIF authors' network has.
    assert parameters(full_size("preact-resnet18")) == 11_171_146 + 2 * 512
    # There, every convolution has a bias in front of its normalisation.
    biases = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
    assert parameters(full_size("vgg16")) == 14_728_266 - biases


def residual(before: int, after: int, changes_shape: bool) -> int:
    """GLIF's block: its shortcut is normalised even where it keeps the shape."""
    return conv(before, after, after) + (conv(before, after, size=1) if changes_shape else 2 * after)


@pytest.mark.parametrize("classes", [10, 50, 51, 100])
def test_parameters_of_glifs_networks(classes: int) -> None:
    head = 512 * 256 + 256 * classes if classes <= 50 else 512 * classes
    resnet18 = conv(3, 64) + 2 * residual(64, 64, False) + head
    resnet18 += sum(residual(c // 2, c, True) + residual(c, c, False) for c in (128, 256, 512))
    assert parameters(full_size("resnet18-glif", classes=classes)) == resnet18
    resnet19 = conv(3, 128) + 3 * residual(128, 128, False) + head
    resnet19 += residual(128, 256, True) + 2 * residual(256, 256, False)
    resnet19 += residual(256, 512, True) + residual(512, 512, False)
    assert parameters(full_size("resnet19", classes=classes)) == resnet19
    published = 12.63e6
    assert abs(resnet19 / published - 1) < 0.01


def test_glif_adds_seven_parameters_and_t_conductances_a_channel() -> None:
    network = full_size("resnet19", "glif")
    channels = 128 * (1 + 3 * 2) + 256 * 3 * 2 + 512 * 2 * 2
    assert parameters(network) == parameters(full_size("resnet19")) + channels * (7 + STEPS)


@each_network
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any]) -> None:
    check_gradients(tiny(name, **options))


@pytest.mark.parametrize("neuron", [neuron for neuron in NEURONS if neuron not in ("klif", "klif-only-relu")])
def test_gradients_of_every_neuron_reach_every_parameter(neuron: str) -> None:
    check_gradients(tiny("klif-mnist", neuron))
    check_gradients(tiny("resnet19", neuron))


def check_gradients(network: SpikingNetwork) -> None:
    images = F.interpolate(torch.rand(3, 3, 8, 8), size=32)
    F.mse_loss(network(images), F.one_hot(torch.arange(3), 10).float()).backward()
    without = [path for path, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


# Structure.


def test_state_dict_of_the_convolutional_networks() -> None:
    """Checkpoints name these; BN's buffers are left out."""
    network = mnist_network(neuron_factory("klif", 2, "torch"), 2, width=1 / 32, image_size=8)
    names = [name for name in network.state_dict() if "running" not in name and "tracked" not in name]
    assert names == [
        "encoder.convolutions.0.weight",
        "encoder.convolutions.1.weight",
        "encoder.convolutions.2.weight",
        "encoder.norm.weight",
        "encoder.norm.bias",
        "encoder.neuron.k",
        "conv1.conv.weight",
        "conv1.norm.weight",
        "conv1.norm.bias",
        "conv1.neuron.k",
        "fc1.linear.weight",
        "fc1.neuron.k",
        "decoder.linear.weight",
        "decoder.neuron.k",
    ]


def test_names_of_the_spiking_layers() -> None:
    blocks = [name for number in range(1, 9) for name in (f"block{number}.body", f"block{number}")]
    assert list(spiking_layers(tiny("resnet18"))) == ["encoder", *blocks]
    assert list(spiking_layers(tiny("resnet18", coding=True))) == ["encoder", *blocks, "decoder"]
    assert list(spiking_layers(tiny("vgg16"))) == ["encoder", *(f"conv{number}" for number in range(1, 13))]
    assert len(spiking_layers(tiny("resnet19"))) == 17


@pytest.mark.parametrize(
    ("name", "notation"),
    [
        ("vgg16", "4C3-4C3-MP2-8C3-8C3-MP2-16C3-16C3-16C3-MP2-(32C3-32C3-32C3-MP2)*2-10L"),
        ("vgg11", "4C3-AP2-8C3-AP2-16C3-16C3-AP2-(32C3-32C3-AP2)*2-AP(7x7)-10L"),
        ("resnet18", "4C3-4R-4R-8R/2-8R-16R/2-16R-32R/2-32R-GAP-10L"),
        ("preact-resnet18", "4C3-4R-4R-8R/2-8R-16R/2-16R-32R/2-32R-GAP-10L"),
        ("resnet18-glif", "4C3-4R-4R-8R-8R-16R/2-16R-32R/2-32R-GAP-16L-10L"),
        ("resnet19", "8C3-8R-8R-8R-16R/2-16R-16R-32R/2-32R-GAP-16L-10L"),
    ],
)
def test_notation_at_a_sixteenth_of_the_width(name: str, notation: str) -> None:
    assert tiny(name).notation == notation


def test_notation_with_coding_layers() -> None:
    decoder = "(100FC-AP10)(dec)"
    assert tiny("resnet18", coding=True).notation == (
        f"(4C3+4C3+4C3)(enc)-4R-4R-8R/2-8R-16R/2-16R-32R/2-32R-GAP-{decoder}"
    )
    assert tiny("vgg16", coding=True).notation == (
        f"(4C3+4C3+4C3)(enc)-4C3-MP2-8C3-8C3-MP2-16C3-16C3-16C3-MP2-(32C3-32C3-32C3-MP2)*2-{decoder}"
    )


def test_threshold_of_the_neuron_scales_glifs_networks() -> None:
    glif = tiny("resnet19", "glif")
    assert_close(glif.encoder.norm.weight.detach(), torch.full((8,), 0.5), "GLIF's initial threshold")
    halved = build_network("resnet19", partial(KLIFNode, v_threshold=0.25), 2, **CIFAR, width=1 / 32)
    assert_close(halved.block1.body.norm1.weight.detach(), torch.full((4,), 0.25), "KLIF's threshold")
    with pytest.raises(TypeError, match=r"v_threshold or init_v_threshold, got Identity with None"):
        build_network("resnet19", nn.Identity, 2, **CIFAR, width=1 / 32)


def test_vgg11_drops_spikes_after_every_convolution() -> None:
    def rates(network: SpikingNetwork) -> list[float]:
        return [module.p for module in network.modules() if "Dropout" in type(module).__name__]

    assert rates(tiny("vgg11")) == [0.4] * 8
    assert rates(tiny("vgg11", dropout=0.3)) == [0.3] * 8
    assert rates(tiny("vgg16")) == rates(tiny("resnet18", coding=True)) == [0.5]
    assert rates(tiny("preact-resnet18")) == rates(tiny("resnet19")) == []


def test_hidden_layers_fire_from_the_start() -> None:
    torch.manual_seed(0)
    network = build_network("klif-cifar10-dvs", neuron_factory("klif", STEPS, "torch"), STEPS, **CIFAR, width=1 / 4)
    spikes = []
    network.fc1.neuron.register_forward_hook(lambda module, inputs, output: spikes.append(output))
    network(F.interpolate(torch.rand(8, 3, 8, 8), size=32))
    assert 0.002 < spikes[0].detach().mean() < 0.2


# Bad input.


@pytest.mark.once
@pytest.mark.parametrize("neuron", ["lif", "klif", "clif", "glif"])
def test_layers_run_step_by_step_too(neuron: str) -> None:
    """Networks keep their states unless they are asked not to."""
    network = tiny("klif-mnist", neuron).eval()
    later = nn.Sequential(*list(network)[1:])
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.abs_()  # enough current for every layer to fire
        spikes = network.encoder(torch.rand(STEPS, 2, 3, 32, 32))
        expected = later(spikes)
        functional.reset_net(later)
        functional.set_step_mode(later, "s")
        found = torch.stack([later(step) for step in spikes])
    assert expected.any()
    assert_close(found, expected)


def test_unknown_network_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"network: expected one of klif-mnist, .*got 'resnet-18'; did you mean 'resn"):
        tiny("resnet-18")
    assert tiny(" ResNet18 ").notation == tiny("resnet18").notation


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0.001}, ValueError, r"width: expected a factor that leaves .* got 0.001"),
        ({"width": -1.0}, ValueError, r"width: expected a positive number, got -1.0"),
        ({"width": "wide"}, TypeError, r"width: expected a number, got 'wide'"),
        ({"classes": 0}, ValueError, r"classes: expected a positive integer, got 0"),
        ({"in_channels": 1.5}, ValueError, r"in_channels: expected a positive integer, got 1.5"),
        ({"image_size": 31}, ValueError, r"image_size: expected at least 32 pixels for 5 poolings, got 31"),
        ({"coding": "yes"}, TypeError, r"coding: expected True or False, got 'yes'"),
        ({"dropout": 0.3}, ValueError, r"dropout: expected it for vgg11 only, got 0.3 for 'vgg16'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny("vgg16", **options)


@pytest.mark.once
def test_options_that_another_network_has() -> None:
    with pytest.raises(ValueError, match="coding: expected it for vgg16 or resnet18 only, got False for 'klif-mnist'"):
        tiny("klif-mnist", coding=False)
    with pytest.raises(ValueError, match="dropout: expected a rate of at least 0 and below 1, got 1"):
        tiny("vgg11", dropout=1)


@pytest.mark.once
def test_a_name_is_no_neuron() -> None:
    with pytest.raises(TypeError, match=r"such as neuron_factory\('klif', 2\), got 'klif'"):
        build_network("vgg16", "klif", 2, **CIFAR)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="time_steps: expected a positive integer, got 0"):
        build_network("vgg16", GLIFNode, 0, **CIFAR)


# The page about them.


PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()


def test_the_page_counts_every_networks_parameters() -> None:
    rows = re.findall(r"^\| `(\S+)` \| (always|never|yes|no) \| .* \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert Counter(name for name, *_ in rows) == Counter([*NETWORKS, "vgg16", "resnet18"])
    for name, coding, count in rows:
        event_camera = {"in_channels": 2, "image_size": 128, "classes": 11}
        options = {**TABLE_1, "vgg11": event_camera}.get(name, CIFAR) | ({"coding": True} if coding == "yes" else {})
        assert parameters(full_size(name, **options)) == int(count.replace(",", "")), name


def test_the_pages_program_runs() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["answer"].shape == (4, 10)
    assert names["by_step"].shape == (6, 4, 10)
