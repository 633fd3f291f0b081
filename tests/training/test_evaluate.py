"""Evaluation: accuracy by time step, firing rates, operations and energy, held to what is computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.neuron import IFNode
from torch import Tensor, nn

from klif_sj import _compat, cli
from klif_sj.models import SpikingNetwork, build_network, neuron_factory
from klif_sj.neuron.states import NOT_KEPT
from klif_sj.training.classifier import recorded_rates
from klif_sj.training.evaluate import NO_COUNTERS, Operations, count_operations, evaluate
from klif_sj.training.recipe import load_recipe
from klif_sj.training.run import TrainingRun

counters = pytest.mark.skipif(_compat.operation_counters() is None, reason="SpikingJelly 0.0.0.0.14 has none")
T = 3


class Playback(nn.Module):
    """Outputs that were fixed beforehand, [T, N, classes], whatever the input."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs[:, : x.shape[0]]


def digits_network(neuron: str = "klif", backend: str = "torch", keep_state: bool = True) -> SpikingNetwork:
    torch.manual_seed(0)
    factory = neuron_factory(neuron, T, backend, keep_state=keep_state)
    net = build_network("klif-mnist", factory, T, in_channels=1, image_size=8, classes=10, width=1 / 16)
    # Enough current for every layer to spike.
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.abs_().mul_(2)
    return net


def test_accuracy_at_each_step_is_of_the_mean_so_far() -> None:
    outputs = torch.zeros(3, 2, 2)
    # Input 0, of class 0: 1 against 0, then 1 against 3 (wrong), then 5 against 3.
    outputs[:, 0] = torch.tensor([[1.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    # Input 1, of class 1: right from the first step on.
    outputs[:, 1] = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    net = SpikingNetwork({"playback": Playback(outputs)}, (1, 1, 1), "")
    found = evaluate(net, [(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]))], counted_inputs=0)
    assert found.accuracy_by_step == [1.0, 0.5, 1.0]
    assert found.accuracy == 1.0
    assert found.inputs == 2
    assert found.operations is None


def test_batches_of_any_size_give_the_whole() -> None:
    net = digits_network()
    x, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    batches = [(x[:7], labels[:7]), (x[7:], labels[7:])]
    found = evaluate(net, batches, counted_inputs=0)
    with recorded_rates(net) as rates:
        output = net(x)
    functional.reset_net(net)
    assert found.accuracy == (output.argmax(1) == labels).double().mean()
    assert len(found.accuracy_by_step) == T
    assert found.firing_rate == pytest.approx({name: rate.item() for name, rate in rates.items()}, rel=1e-6)
    assert list(found.firing_rate) == ["encoder", "conv1", "fc1", "decoder"]
    assert 0 < found.firing_rate["encoder"] < 1
    assert all(neuron.v == 0.0 for neuron in net.modules() if hasattr(neuron, "v"))


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        evaluate(digits_network(), [])


def test_the_old_line_counts_no_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "operation_counters", lambda: None)
    found = evaluate(digits_network(), [(torch.rand(2, 1, 8, 8), torch.arange(2))])
    assert found.operations is None
    assert len(found.firing_rate) == 4


@counters
def test_operations_by_hand() -> None:
    """Two inputs, T = 2: one feature drives an IF neuron, whose spikes go on to three outputs."""
    net = nn.Sequential(
        layer.Linear(4, 1, bias=False, step_mode="m"),
        IFNode(step_mode="m"),
        layer.Linear(1, 3, bias=False, step_mode="m"),
    ).eval()
    nn.init.constant_(net[0].weight, 0.25)
    x = torch.full((2, 2, 4), 0.0)
    x[:, 0] = 0.5  # 0.5 a step: a spike at the second
    x[:, 1] = 1.5  # 1.5 a step: a spike at each
    found = count_operations(net, [x], 2)
    assert found is not None
    # First layer: T x inputs x 4 x 1 = 16 multiplications, 8 for each input; second: 3 spikes to 3 synapses each.
    assert found.multiply_accumulations == 8
    assert found.synaptic_operations == found.accumulations == 4.5
    assert found.synaptic_operations_by_layer == {"0": 0, "2": 4.5}
    assert found.compute_energy == pytest.approx((8 * 4.6 + 4.5 * 0.9) * 1e-12)
    # Of 4 bytes each: every weight for every operation that uses it, and the potential read and written at each step.
    assert found.memory_energy == pytest.approx(4 * (8 + 4.5 + 2 * 2) * 24.96e-12)


@counters
def test_a_static_image_is_convolved_once() -> None:
    found = count_operations(digits_network().eval(), [torch.rand(5, 1, 8, 8)], 5)
    assert found is not None
    assert found.multiply_accumulations == 3 * 9 * 8 * 8 * 8  # three 3x3 convolutions of 8 channels over 8x8 pixels
    spiking = {name: count for name, count in found.synaptic_operations_by_layer.items() if "encoder" not in name}
    assert list(spiking) == ["conv1.conv", "fc1.linear", "decoder.linear"]
    assert all(spiking.values())
    assert sum(spiking.values()) == found.synaptic_operations


@counters
@pytest.mark.parametrize("neuron", ["klif", "lif"])
def test_operations_do_not_depend_on_the_backend(neuron: str) -> None:
    x = torch.rand(5, 1, 8, 8)
    nets = (digits_network(neuron, name).eval() for name in ("torch", "auto"))
    counted = [count_operations(net, [x], 5) for net in nets]
    assert counted[0] == counted[1]
    assert isinstance(counted[0], Operations)


@pytest.mark.parametrize("neuron", ["klif", "clif", "glif", "lif"])
def test_a_network_that_keeps_no_states_is_evaluated_as_one_that_does(neuron: str) -> None:
    """The energy of memory accesses too, which is counted from states that are there."""
    x, labels = torch.rand(5, 1, 8, 8), torch.arange(5)
    found = []
    for keep_state in (True, False):
        net = digits_network(neuron, "auto", keep_state)
        found.append(evaluate(net, [(x[:3], labels[:3]), (x[3:], labels[3:])]))
        net(x)
        assert (net.fc1.neuron._memories["v"] is NOT_KEPT) == (not keep_state)
    assert found[0] == found[1]
    assert all(found[1].firing_rate.values())


@counters
def test_operations_are_the_mean_over_the_first_whole_batches() -> None:
    net = digits_network("lif")
    x, labels = torch.rand(9, 1, 8, 8), torch.zeros(9, dtype=torch.long)
    batches = list(zip(x.split(3), labels.split(3), strict=True))
    found = evaluate(net, batches, counted_inputs=4).operations
    whole = count_operations(net, [x[:6]], 6)
    assert found is not None
    assert whole is not None
    assert found.inputs == 6
    assert found.synaptic_operations == pytest.approx(whole.synaptic_operations)
    assert found.memory_energy == pytest.approx(whole.memory_energy)
    assert found.synaptic_operations_by_layer == pytest.approx(whole.synaptic_operations_by_layer)


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A real, tiny training on digits: its checkpoint and its result."""
    recipe = load_recipe("digits").override(
        epochs=1, time_steps=2, width=1 / 32, batch_size=128, backend="torch", augmentations=("crop", "normalise")
    )
    run = TrainingRun(recipe, tmp_path_factory.mktemp("training"), data_root=Path("data"), accelerator="cpu")
    result = run.run()
    return run.checkpoint, result


def test_the_command_gives_what_the_training_measured(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, result = trained
    file = tmp_path / "evaluation.json"
    assert cli.main(["evaluate", str(checkpoint), "--accelerator=cpu", f"--json={file}"]) == 0
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert found["inputs"] == 360
    assert found["accuracy"] == pytest.approx(result["test_accuracy"])
    assert found["accuracy_by_step"][-1] == found["accuracy"]
    assert found["firing_rate"] == pytest.approx(result["firing_rate"], rel=1e-4)
    assert found["recipe"]["name"] == "digits"
    assert f"Test accuracy on 360 inputs: {100 * found['accuracy']:.2f} %" in printed
    assert ("energy of these" in printed) == (_compat.operation_counters() is not None)


def test_a_report_that_cannot_be_written_is_named(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(trained[0]), "--accelerator=cpu", "--counted-inputs=0", f"--json={tmp_path}"]
    assert cli.main(command) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_command_says_where_there_are_no_counters(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_compat, "operation_counters", lambda: None)
    assert cli.main(["evaluate", str(trained[0]), "--accelerator=cpu"]) == 0
    assert NO_COUNTERS in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("broken.ckpt", [], "broken.ckpt cannot be read"),
        ("none.ckpt", [], "there is no checkpoint"),
        ("last.ckpt", ["--batch-size=5000"], "batch_size: expected at most the 1437 training"),
        ("last.ckpt", ["--batch-size=0"], "batch_size: expected a positive integer, got 0"),
        ("last.ckpt", ["--accelerator=gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("last.ckpt", ["--counted-inputs=-1"], "counted_inputs: expected at least 0, got -1"),
    ],
)
def test_the_command_refuses(
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "broken.ckpt").write_text("nothing")
    (tmp_path / "last.ckpt").write_bytes(trained[0].read_bytes())
    assert cli.main(["evaluate", str(tmp_path / name), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
