"""Networks in other formats: ONNX, and SpikingJelly 2's NIR."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from neurons import CHANNELS, CPU_BACKENDS, glif
from spikingjelly.activation_based import functional, layer, neuron
from tolerance import assert_close, assert_equal
from torch import Tensor, fx, nn

from klif_sj import CLIFNode, KLIFNode, LearnableATan, _compat, swap_neurons

NEURONS: dict[str, Callable[..., nn.Module]] = {
    "KLIF": KLIFNode,
    "KLIF with a learned surrogate": lambda **options: KLIFNode(surrogate_function=LearnableATan(), **options),
    "CLIF": CLIFNode,
    "GLIF": glif,
}


def network(make: Callable[..., nn.Module], step_mode: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(6, CHANNELS), make(**options), layer.Linear(CHANNELS, 4))
    functional.set_step_mode(net, step_mode)
    return net.eval()


def current(step_mode: str) -> Tensor:
    return 3 * (torch.rand(4, 3, 6) if step_mode == "m" else torch.rand(3, 6))


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "exported"])
@pytest.mark.parametrize("name", NEURONS)
def test_onnx_computes_the_same(name: str, dynamo: bool, step_mode: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    if not (dynamo or _compat.SPIKINGJELLY_2) and name.startswith("KLIF"):
        pytest.skip("torch's older exporter cannot see into the surrogates of 0.0.0.0.14")
    net, x, file = network(NEURONS[name], step_mode), current(step_mode), tmp_path / "net.onnx"
    expected = net(x).detach()
    functional.reset_net(net)
    torch.onnx.export(net, (x,), file, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(file)
    (output,) = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(output), expected)


@pytest.mark.parametrize("backend", sorted({"auto", *CPU_BACKENDS}))
def test_an_export_to_onnx_sees_the_equations(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(KLIFNode, "m", backend=backend), current("m")
    net(x)
    functional.reset_net(net)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        graph = str(torch.jit.trace(net, x, check_trace=False).inlined_graph)
    assert "klif_sj::forward" not in graph
    assert graph.count("aten::relu") == 4
    assert any("backend 'cpp' does not serve an export to ONNX" in str(w.message) for w in told) == (backend == "cpp")


def test_a_symbolic_trace_is_told_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"got a torch\.fx\.Proxy.*a leaf of the tracer.*swap_neurons"):
        fx.symbolic_trace(network(KLIFNode, "m"))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, KLIFNode | nn.Linear)

    net, x = network(KLIFNode, "m"), current("m")
    traced = fx.GraphModule(net, Tracer().trace(net))
    expected = net(x)
    functional.reset_net(net)
    assert_equal(traced(x), expected)


@pytest.mark.skipif(not _compat.SPIKINGJELLY_2, reason="0.0.0.0.14 has no NIR exchange")
def test_nir_takes_what_is_lif() -> None:
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    from spikingjelly.activation_based.nir_exchange import export_to_nir, import_from_nir

    net, x = network(KLIFNode, "s", tau=3.0, v_threshold=0.7, activation="identity", learn_k=False), current("s")
    with pytest.raises(TypeError, match=r"For NIR.*swap_neurons\(net, LIFNode\)"):
        export_to_nir(net, x)
    expected = [net(x), net(x)]
    swap_neurons(net, neuron.LIFNode)
    back = import_from_nir(export_to_nir(net, x))
    first, state = back(x)
    second, _ = back(x, state)
    assert_close(first, expected[0])
    assert_close(second, expected[1])
