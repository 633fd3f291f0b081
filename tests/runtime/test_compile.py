"""torch.compile, export, jit.trace and make_fx with the default backend: one graph, right gradients, saved programs."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
from neurons import BATCH, CHANNELS, CPU_BACKENDS, STEPS, current
from spikingjelly.activation_based import functional, layer, neuron
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from versions import needs_compile

from klif_sj import CLIFNode, GLIFNode, KLIFNode, fuse

pytestmark = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


NODES = {
    "klif": lambda: KLIFNode(step_mode="m"),
    "clif": lambda: CLIFNode(step_mode="m"),
    "glif": lambda: GLIFNode(T=STEPS, inplane=CHANNELS),
}


def network() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(layer.Linear(CHANNELS, 8), KLIFNode(), layer.Linear(8, CHANNELS), CLIFNode())
    functional.set_step_mode(net, "m")
    return net


def trained(net: nn.Module, run: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    functional.reset_net(net)
    spikes = run(x)
    (spikes * torch.arange(CHANNELS)).sum().backward()
    return [spikes.detach(), *(p.grad.clone() for p in net.parameters())]


@needs_compile
@pytest.mark.parametrize("warm", [False, True])
def test_a_network_is_one_graph(warm: bool) -> None:
    net, x = network(), current()
    if warm:
        trained(net, net, x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        trained(net, compiled, current())
    found = trained(net, compiled, x)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for actual, expected in zip(found, trained(net, net, x), strict=True):
        assert_close(actual, expected)


@needs_compile
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["klif", "clif", "glif"])
def test_single_steps_are_not_compiled_again_and_again(name: str, backend: str) -> None:
    """GLIF counts its steps, as it has parameters of its own for each."""
    node, x = NODES[name](), current(STEPS, BATCH, CHANNELS)
    node.step_mode, node.backend = "s", backend
    compiled = torch.compile(node, backend="eager")
    spikes = torch.stack([compiled(step) for step in x])
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first step starts from a number
    node.reset()
    assert_equal(spikes, torch.stack([node(step) for step in x]))


@needs_compile
@pytest.mark.parametrize("k", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_gradient_of_a_bounded_k(k: float, sign: float) -> None:
    x, found = current(), []
    for compiled in (False, True):
        node = KLIFNode(step_mode="m", init_k=k)
        run = torch.compile(node, backend="aot_eager", fullgraph=True) if compiled else node
        (run(x) * sign * torch.linspace(-1.0, 2.0, CHANNELS)).sum().backward()
        found.append(node.k.grad)
    assert_close(*found)


@needs_compile
def test_a_changed_setting_is_compiled_again() -> None:
    node, x = KLIFNode(step_mode="m"), current()
    compiled = torch.compile(node, backend="eager", fullgraph=True)
    for tau in (2.0, 3.0):
        node.tau = tau
        node.reset()
        found = compiled(x)
        assert_equal(found, KLIFNode(step_mode="m", tau=tau, backend="torch")(x))


def test_a_copy_of_a_compiled_node_runs_the_copy() -> None:
    node, x = KLIFNode(step_mode="m"), current()
    node.compile(backend="eager")
    node(x)
    node.reset()
    twin = copy.deepcopy(node)
    with torch.no_grad():
        twin.k.fill_(3.0)
    assert_equal(twin(x), KLIFNode(step_mode="m", init_k=3.0)(x))
    assert node.v == 0.0


@needs_compile
@pytest.mark.parametrize("name", NODES)
def test_a_cold_export_is_saved_and_loaded_by_another_process(name: str, tmp_path: Path) -> None:
    node, x = NODES[name]().eval(), current()
    node.tau_is_unusual = 2.0  # no other test has traced this very node
    program = torch.export.export(node, (x,))
    calls = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("autocast" in call or "promote" in call or "full" in call for call in calls), calls
    node.reset()
    expected = node(x)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, expected), tmp_path / "expected.pt")
    code = (
        "import klif_sj, torch\n"
        f"x, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"module = torch.export.load({str(tmp_path / 'program.pt2')!r}).module()\n"
        "assert torch.equal(module(x), expected)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@needs_compile
@pytest.mark.parametrize("name", NODES)
def test_a_dynamic_batch_is_exported_and_traced(name: str) -> None:
    node, x = nn.Sequential(layer.Linear(CHANNELS, CHANNELS, step_mode="m"), NODES[name]()).eval(), current()
    with torch.no_grad():
        exported = torch.export.export(node, (x,), dynamic_shapes=({1: torch.export.Dim("N", min=1, max=64)},)).module()
        functional.reset_net(node)
        traced = torch.jit.trace(node, (x,), check_trace=False)
        for batch in (1, 2, 9):
            y = current(STEPS, batch, CHANNELS)
            functional.reset_net(node)
            expected = node(y)
            assert_equal(exported(y), expected)
            assert_equal(traced(y), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traces_that_are_checked_saved_and_loaded() -> None:
    """A trace is checked by a second one, without a gradient: both are of the same operator, from the reset values."""
    net, x = network(), current()
    traced = torch.jit.trace(net, x)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    functional.reset_net(net)
    assert_equal(torch.jit.load(buffer)(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_is_refused() -> None:
    """TorchScript cannot compile a LIFNode either."""
    net = network()
    fused = neuron.LIFNode()
    fuse(fused)
    for module, name in ((net, "KLIFNode"), (fused, "LIFNode")):
        with pytest.raises(RuntimeError, match=f"{name}: expected torch.jit.trace or torch.export, got torch.jit.scr"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_add_graph(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(network(), current())
    assert any(tmp_path.iterdir())


def test_make_fx() -> None:
    node, x = CLIFNode(step_mode="m").eval(), current()
    with torch.no_grad():
        graph = make_fx(node)(x)
    assert [str(n.target) for n in graph.graph.nodes if "klif_sj" in str(n.target)] == ["klif_sj.forward.default"]
    node.reset()
    assert_equal(graph(x), node(x))
