"""The pages in docs/ that contain a program: it runs as it is printed, and its neurons are equal on every backend."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from neurons import CPU_BACKENDS
from spikingjelly.activation_based import functional
from tolerance import assert_close, assert_equal
from torch import Tensor

from klif_sj import CLIFNode, FusedNode, KLIFNode

DOCS = Path(__file__).parents[2] / "docs"
CHANNELS = 6

FUSED = [
    *(pytest.param(backend, "cpu", id=backend) for backend in CPU_BACKENDS if backend != "torch"),
    pytest.param(
        "cupy",
        "cuda",
        id="cupy",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's code blocks, run one after the other as one module."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "own-neuron.md").read_text(), re.MULTILINE | re.DOTALL)
    file = tmp_path_factory.mktemp("page") / "own_neuron_page.py"
    file.write_text("\n".join(blocks))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[file.stem]


def make(page: ModuleType, neuron: str, **options: object) -> FusedNode:
    arguments = {"AdaptiveThresholdNode": {"channels": CHANNELS}}.get(neuron, {})
    return getattr(page, neuron)(**arguments, **options)


def results(node: FusedNode, x: Tensor) -> dict[str, Tensor]:
    """Spikes, states and gradients of two sequences, the second from the states of the first."""
    x = x.detach().requires_grad_()
    spike = torch.cat([node(x), node(x)])
    weights = torch.linspace(-1, 1, spike.numel(), dtype=x.dtype, device=x.device).view(spike.shape)
    states = {name: getattr(node, name) for name in node.states}
    ((spike * weights).sum() + sum(0.1 * state.sum() for state in states.values())).backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in node.named_parameters()}
    return {"spike": spike, **states, "gradient of x": x.grad, **gradients}


def test_the_page_runs_and_defines_its_neurons(page: ModuleType) -> None:
    defined = {
        name for name, value in vars(page).items() if isinstance(value, type) and value.__module__ == page.__name__
    }
    assert defined == {"LearnedLeakNode", "AdaptiveThresholdNode"}
    assert page.spikes.shape == page.x_seq.shape
    assert 0.05 < page.spikes.mean() < 0.95


def test_the_first_neuron_takes_15_lines(page: ModuleType) -> None:
    first = re.search(r"class LearnedLeakNode.*?^```$", (DOCS / "own-neuron.md").read_text(), re.MULTILINE | re.DOTALL)
    assert first is not None
    assert sum(bool(line.strip()) for line in first.group().splitlines()[:-1]) <= 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("neuron", ["LearnedLeakNode", "AdaptiveThresholdNode"])
def test_fused_kernels_equal_torch(
    page: ModuleType, neuron: str, backend: str, device: str, dtype: torch.dtype
) -> None:
    for shape in [(4, 3, CHANNELS), (7, 2, CHANNELS, 5, 3)]:
        x = (torch.randn(shape, dtype=dtype) + 1).to(device)
        expected = results(make(page, neuron, step_mode="m", backend="torch").to(device), x)
        actual = results(make(page, neuron, step_mode="m", backend=backend).to(device), x)
        assert 0.05 < expected["spike"].mean() < 0.95
        assert_equal(actual.pop("spike"), expected.pop("spike"), "spike")
        for name, value in expected.items():
            assert_close(actual[name], value, name)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("neuron", ["LearnedLeakNode", "AdaptiveThresholdNode"])
def test_the_page_is_right_about_steps_and_states(page: ModuleType, neuron: str, backend: str) -> None:
    node = make(page, neuron, step_mode="m", backend=backend, store_v_seq=True)
    x = torch.randn(5, 3, CHANNELS) + 1
    spikes, sequences = node(x), {name: getattr(node, f"{name}_seq") for name in node.states}
    functional.reset_net(node)
    node.step_mode = "s"
    assert_equal(torch.stack([node(step) for step in x]), spikes)
    for name, sequence in sequences.items():
        assert_close(getattr(node, f"{name}_seq"), sequence, name)
    functional.reset_net(node)
    assert all(getattr(node, name) == 0 for name in node.states)


def test_the_equations_of_the_page_by_hand(page: ModuleType) -> None:
    node = page.LearnedLeakNode(backend="torch")
    spikes = [node(torch.tensor([value])).item() for value in (0.75, 0.75, 0.25)]
    # keep = sigmoid(0) = 1/2: 0.75; 1.125 fires, 0.125 remains; 0.3125.
    assert spikes == [0, 1, 0]
    assert node.v.item() == 0.3125

    node = page.AdaptiveThresholdNode(channels=1, decay=0.5, backend="torch")
    spikes = [node(torch.tensor([[value]])).item() for value in (1.0, 1.05, 1.15)]
    # Fires at 1, threshold 1.2; decayed to 1.1, 1.05 does not fire; decayed to 1.05, 1.675 fires.
    assert spikes == [1, 0, 1]
    assert node.rise.item() == pytest.approx(0.05 + 0.2)


def test_the_pictures_can_be_drawn_and_are_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    script = runpy.run_path(str(DOCS / "pictures.py"))
    drawn = {file.name: file.read_text() for file in script["draw_all"](tmp_path)}
    shown = set(re.findall(r"\(pictures/(.*?)\)", (DOCS / "neurons.md").read_text()))
    assert set(drawn) == shown == {file.name for file in (DOCS / "pictures").iterdir()}
    assert all("<svg" in text for text in drawn.values())


def test_the_pictures_neurons_fire_differently() -> None:
    """Each picture is to show what a neuron adds; CLIF's reset is the deeper one, and M decays between spikes."""
    pytest.importorskip("matplotlib").use("Agg")
    script = runpy.run_path(str(DOCS / "pictures.py"))
    x_seq = script["input_current"](0.9)
    assert x_seq.shape == (script["STEPS"], 1, 1)
    soft = script["run"](KLIFNode(activation="identity", decay_input=False, v_reset=None, backend="torch"), x_seq)
    clif = script["run"](CLIFNode(backend="torch"), x_seq)
    assert not torch.equal(soft["spike"], clif["spike"])
    fired = clif["spike"].bool()
    assert_close(clif["charged"][~fired], clif["v"][~fired])
    assert ((clif["charged"] - clif["v"])[fired] > 1.7).all()
    assert_close((soft["charged"] - soft["v"])[soft["spike"].bool()], torch.ones(int(soft["spike"].sum())))
