"""Comparisons on tiny recipes: what is trained, logged, reported, refused and resumed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from spikingjelly.activation_based import functional
from tolerance import assert_equal

from klif_sj import KLIFNode
from klif_sj.models import mnist_network, neuron_factory
from klif_sj.training import compare, data, plots, report
from klif_sj.training.compare import Comparison
from klif_sj.training.data import make_data
from klif_sj.training.measure import measure_step
from klif_sj.training.module import SpikingClassifier, firing_rates, neuron_parameters
from klif_sj.training.settings import Settings

PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = ["encoder", "conv1", "fc1", "decoder"]
TINY: dict[str, Any] = {"epochs": 4, "time_steps": 3, "width": 1 / 16, "batch_size": 64, "learning_rate": 1e-2}


def settings(**given: Any) -> Settings:
    defaults = {"neurons": ("lif", "klif"), "backend": "torch", "device": "cpu", "seed": 3, "data_root": Path("data")}
    return Settings.for_dataset("digits", **{**defaults, **TINY, **given})


@pytest.fixture(scope="module", autouse=True)
def _one_step_is_measured() -> Iterator[None]:
    """Times do not matter here, so one step is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "measure_step", partial(measure_step, min_seconds=0))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, report.Report]:
    """A comparison that ran to its end."""
    out = tmp_path_factory.mktemp("finished")
    return out, Comparison(settings(), out, command="klif-sj compare").run()


# What is reported


def test_report_holds_what_was_logged(finished: tuple[Path, report.Report]) -> None:
    out, returned = finished
    found = json.loads((out / "report.json").read_text())
    assert found == returned
    assert found["settings"] == json.loads((out / "comparison.json").read_text())
    assert found["network"] == "(8C3+8C3+8C3)(enc)-8C3-MP2-128FC-(100FC-AP10)(dec)"
    assert list(found["neurons"]) == ["lif", "klif"]
    for name, result in found["neurons"].items():
        saved = torch.load(out / "checkpoints" / name / "last.ckpt", weights_only=True)
        assert result["history"] == saved["callbacks"]["History"]["epochs"]
        assert [row["epoch"] for row in result["history"]] == [1, 2, 3, 4]
        last = result["history"][-1]
        assert result["test_accuracy"] == last["test_accuracy"]
        assert result["firing_rate"] == {layer: last[f"firing_rate/{layer}"] for layer in LAYERS}
        assert all(0 <= rate <= 1 for rate in result["firing_rate"].values())
        assert result["k"] == ({} if name == "lif" else {layer: last[f"k/{layer}"] for layer in LAYERS})
        assert result["parameters"] == sum(
            value.numel() for key, value in saved["state_dict"].items() if "running" not in key and "num_ba" not in key
        )
        assert result["step_seconds"] > 0
        assert result["step_peak_bytes"] > 0
    assert found["neurons"]["lif"]["backend"] == "SpikingJelly"
    assert found["neurons"]["klif"]["backend"] == "torch"


def test_logged_accuracy_rates_and_k_are_those_of_the_saved_network(finished: tuple[Path, report.Report]) -> None:
    out, found = finished
    saved = torch.load(out / "checkpoints" / "klif" / "last.ckpt", weights_only=True)["state_dict"]
    net = mnist_network(neuron_factory("klif", 3, "torch"), 3, width=1 / 16, image_size=8)
    net.load_state_dict({name.removeprefix("net."): value for name, value in saved.items()})
    images, labels = data.load("digits", Path())[1]
    with torch.no_grad():
        rates, measured = firing_rates(net.eval(), images)
    result = found["neurons"]["klif"]
    assert result["test_accuracy"] == pytest.approx((rates.argmax(1) == labels).double().mean().item(), rel=1e-6)
    for layer in LAYERS:
        assert result["firing_rate"][layer] == pytest.approx(measured[layer].item(), rel=1e-5)
    assert result["k"] == {layer: value.item() for layer, value in zip(LAYERS, _ks(net), strict=True)}
    assert all(value != 1 for value in result["k"].values()), "every k has learned"


def _ks(net: torch.nn.Module) -> list[torch.Tensor]:
    return [module.k.detach() for module in net.modules() if isinstance(module, KLIFNode)]


def test_markdown_and_pictures_show_the_results(finished: tuple[Path, report.Report]) -> None:
    out, found = finished
    text = (out / "report.md").read_text()
    klif = found["neurons"]["klif"]
    lif = found["neurons"]["lif"]
    assert f"| test accuracy, % | {100 * lif['test_accuracy']:.2f} | {100 * klif['test_accuracy']:.2f} |" in text
    assert f"| k, fc1 | – | {klif['k']['fc1']:.4f} |" in text
    assert "one image is 0.28 points" in text
    assert "\n    klif-sj compare\n" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == found["pictures"] == ["accuracy.png", "k.png", "firing_rate.png"]
    assert all((out / picture).read_bytes().startswith(PNG) for picture in pictures)


def test_table_has_a_row_for_each_layer(finished: tuple[Path, report.Report]) -> None:
    _, found = finished
    table = report.terminal_table(found)
    assert [column.header for column in table.columns] == ["", "lif", "klif"]
    assert list(table.columns[0].cells) == [
        "test accuracy, %",
        *(f"firing rate, {layer}" for layer in LAYERS),
        *(f"k, {layer}" for layer in LAYERS),
        "time a step, ms",
        "peak memory, MiB",
        "backend",
    ]


def test_curves_are_the_histories(finished: tuple[Path, report.Report]) -> None:
    neurons = finished[1]["neurons"]
    lines = plots._accuracy(neurons).axes[0].lines
    for line, (name, result) in zip(lines, neurons.items(), strict=True):
        assert line.get_label() == name
        assert list(line.get_ydata()) == [100 * row["test_accuracy"] for row in result["history"]]
    k_lines = plots._k({"klif": neurons["klif"]}).axes[0].lines
    for line, layer in zip(k_lines, LAYERS, strict=True):
        assert list(line.get_ydata()) == [row[f"k/{layer}"] for row in neurons["klif"]["history"]]
    bars = plots._firing_rates(neurons).axes[0].patches
    rates = [result["firing_rate"][layer] for result in neurons.values() for layer in LAYERS]
    assert [bar.get_height() for bar in bars] == rates


def test_no_picture_of_k_where_no_neuron_has_one(finished: tuple[Path, report.Report], tmp_path: Path) -> None:
    found = {**finished[1], "neurons": {"lif": finished[1]["neurons"]["lif"]}}
    (tmp_path / "k.png").write_bytes(b"of an earlier comparison")
    assert plots.draw(found, tmp_path) == ["accuracy.png", "firing_rate.png"]
    assert not (tmp_path / "k.png").exists()


# How it trains


def test_both_neurons_learn(finished: tuple[Path, report.Report]) -> None:
    for result in finished[1]["neurons"].values():
        first, *_, last = result["history"]
        assert last["train_loss"] < 0.08 < first["train_loss"]
        assert last["test_accuracy"] > 0.5, "chance is 0.1"


def test_every_neuron_meets_the_same_weights_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, batches = [], []
    train = SpikingClassifier.training_step

    def recorded(self: SpikingClassifier, batch: Any, index: int) -> Any:
        if index == 0 and self.current_epoch == 0:
            weights.append(self.net.fc1.linear.weight.detach().clone())
        batches.append(batch[1])
        return train(self, batch, index)

    monkeypatch.setattr(SpikingClassifier, "training_step", recorded)
    Comparison(settings(epochs=2), tmp_path).run()
    lif, klif = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    assert len(lif) == len(klif) == 2 * 23
    assert_equal(weights[0], weights[1], "initial weights")
    assert all(torch.equal(a, b) for a, b in zip(lif, klif, strict=True))
    assert not torch.equal(torch.cat(lif[:23]), torch.cat(lif[23:])), "another order in the next epoch"
    assert_equal(torch.cat(lif[:23]).sort().values, torch.cat(lif[23:]).sort().values, "labels of an epoch")


@pytest.mark.parametrize(("given", "used"), [(None, 1), (2, 2)])
def test_threads_are_the_recipes_or_the_given_ones_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int | None, used: int
) -> None:
    seen = set()

    def observed(self: SpikingClassifier, batch: Any, index: int) -> None:
        seen.add(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(SpikingClassifier, "training_step", observed)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        Comparison(settings(threads=given), tmp_path).run()
    assert seen == {used}
    assert torch.get_num_threads() == before


def test_loss_optimizer_and_schedule_are_the_papers() -> None:
    module = SpikingClassifier(torch.nn.Linear(2, 3))
    rates = torch.tensor([[0.2, 0.5, 0.1], [1.0, 0.0, 0.0]])
    by_step = torch.stack([rates + 0.3, rates - 0.3])
    squares = (0.2**2 + (0.5 - 1) ** 2 + 0.1**2) + (1.0**2 + 0.0 + (0.0 - 1) ** 2)
    assert module.loss(by_step, torch.tensor([1, 2])).item() == pytest.approx(squares / 6)
    (optimizer,), (schedule,) = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert (schedule.T_max, schedule.eta_min) == (100, 0)


def test_net_is_reset_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mnist_network(neuron_factory("klif", 2, "torch"), 2, width=1 / 32, image_size=8)
    states = []
    train = SpikingClassifier.training_step

    def recorded(self: SpikingClassifier, batch: Any, index: int) -> Any:
        states.append(net.encoder.neuron.v)
        return train(self, batch, index)

    monkeypatch.setattr(SpikingClassifier, "training_step", recorded)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SpikingClassifier(net), make_data("digits", Path(), 512, 0))
    assert states == [0.0, 0.0, 0.0]
    assert net.encoder.neuron.v == 0.0, "the evaluation resets as well"


def test_states_do_not_leak_from_one_evaluation_into_the_next() -> None:
    net = mnist_network(neuron_factory("klif", 3, "torch"), 3, width=1 / 16, image_size=8).eval()
    images = torch.rand(6, 1, 8, 8)
    first, _ = firing_rates(net, images)
    functional.reset_net(net)
    again, _ = firing_rates(net, images)
    assert_equal(again, first, "rates")
    assert not net.encoder.neuron._forward_hooks


def test_neuron_parameters_are_effective_ones() -> None:
    net = mnist_network(neuron_factory("klif", 2, "torch"), 2, width=1 / 32, image_size=8)
    with torch.no_grad():
        net.fc1.neuron.k.fill_(9.0)
    assert {name: value.item() for name, value in neuron_parameters(net).items()} == {
        "k/encoder": 1.0,
        "k/conv1": 1.0,
        "k/fc1": 5.0,
        "k/decoder": 1.0,
    }
    glif = mnist_network(neuron_factory("glif", 2, "torch"), 2, width=1 / 32, image_size=8)
    assert neuron_parameters(glif)["tau/encoder"].item() == pytest.approx(0.25)
    assert neuron_parameters(mnist_network(neuron_factory("lif", 2), 2, width=1 / 32, image_size=8)) == {}


# What a step costs


class Allocating(SpikingClassifier):
    """In place of a training module: a step that holds a known number of bytes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        held = torch.ones(250_000)
        scratch = held * 2
        larger = scratch[:10] * held[:10]
        del held, scratch
        return self.net(images).unsqueeze(0) * larger


def test_peak_memory_is_the_most_that_a_step_holds_at_a_time() -> None:
    """Two blocks of 1 MB at a time, and a few small tensors."""
    module = Allocating(torch.nn.Linear(1, 10))
    cost = measure_step(module, torch.ones(1, 1), torch.tensor([0]), min_seconds=0)
    assert 2_000_000 <= cost.peak_bytes < 2_020_000


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(0)
    module = SpikingClassifier(mnist_network(neuron_factory("klif", 2, "torch"), 2, width=1 / 32, image_size=8))
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_numbers = torch.get_rng_state()
    measure_step(module, images, labels, min_seconds=0)
    for name, value in module.state_dict().items():
        assert_equal(value, before[name], name)
    assert_equal(torch.get_rng_state(), random_numbers, "generator state")
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.net.encoder.neuron.v == 0.0


def test_a_step_is_measured_on_as_many_images_as_the_report_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test set's 360 images would come in batches of 45."""
    sizes, measure = [], compare.measure_step
    monkeypatch.setattr(
        compare, "measure_step", lambda module, *batch: sizes.append(len(batch[0])) or measure(module, *batch)
    )
    Comparison(settings(epochs=1, batch_size=50), tmp_path).run()
    assert sizes == [50, 50]


# Interruption and resumption


def assert_same_training(resumed: Path, uninterrupted: Path, neurons: list[str]) -> None:
    """The same numbers in every epoch, and the same weights to the last bit."""
    reports = [json.loads((out / "report.json").read_text())["neurons"] for out in (resumed, uninterrupted)]
    assert list(reports[0]) == neurons
    for name in neurons:
        assert reports[0][name]["history"] == reports[1][name]["history"]
        weights, expected = (
            torch.load(out / "checkpoints" / name / "last.ckpt", weights_only=True)["state_dict"]
            for out in (resumed, uninterrupted)
        )
        for key, value in expected.items():
            assert_equal(weights[key], value, f"{name}: {key}")


def test_interrupted_comparison_resumes_as_if_uninterrupted(
    finished: tuple[Path, report.Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = SpikingClassifier.training_step

    def interrupted(self: SpikingClassifier, batch: Any, index: int) -> Any:
        if self.current_epoch == 1 and index == 3 and any(isinstance(m, KLIFNode) for m in self.modules()):
            raise KeyboardInterrupt
        return train(self, batch, index)

    def counted(self: SpikingClassifier, batch: Any, index: int) -> Any:
        trained.append(self.current_epoch)
        return train(self, batch, index)

    monkeypatch.setattr(SpikingClassifier, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Comparison(settings(), tmp_path).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "report.json").exists()
    with pytest.raises(ValueError, match="holds an unfinished comparison. Add --resume"):
        Comparison(settings(), tmp_path)
    monkeypatch.setattr(SpikingClassifier, "training_step", counted)
    Comparison(settings(), tmp_path, resume=True).run()
    assert trained == [1] * 23 + [2] * 23 + [3] * 23, "only the epochs that KLIF lacked"
    assert_same_training(tmp_path, finished[0], ["lif", "klif"])


def test_killed_comparison_resumes_as_if_uninterrupted(finished: tuple[Path, report.Report], tmp_path: Path) -> None:
    options = {name.replace("_", "-"): value for name, value in {**TINY, "seed": 3}.items()}
    command = [sys.executable, "-m", "klif_sj", "compare", "--neurons=klif", "--backend=torch", "--device=cpu"]
    command += [*(f"--{name}={value}" for name, value in options.items()), f"--out={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "checkpoints" / "klif" / "last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, "it ended without a checkpoint"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(torch.load(checkpoint, weights_only=True)["callbacks"]["History"]["epochs"]) < TINY["epochs"]
    Comparison(settings(neurons=("klif",)), tmp_path, resume=True).run()
    assert_same_training(tmp_path, finished[0], ["klif"])


def test_resuming_refuses_other_settings_and_broken_checkpoints(finished: tuple[Path, report.Report]) -> None:
    out, _ = finished
    with pytest.raises(ValueError, match="begun with other settings: epochs: 4 then, 5 now; seed: 3 then, 4 now"):
        Comparison(settings(epochs=5, seed=4), out, resume=True)
    checkpoint = out / "checkpoints" / "klif" / "last.ckpt"
    whole = checkpoint.read_bytes()
    try:
        checkpoint.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"klif.last\.ckpt cannot be read .* Delete it to train"):
            Comparison(settings(), out, resume=True)
    finally:
        checkpoint.write_bytes(whole)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious").write_text("")
    with pytest.raises(ValueError, match="checkpoints is no comparison's"):
        Comparison(settings(), tmp_path)
    assert (tmp_path / "checkpoints" / "precious").exists()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        Comparison(settings(), file)


def test_nothing_is_written_before_everything_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at most the 1437 training images of digits, got 1438"):
        Comparison(settings(batch_size=1438), tmp_path / "out")
    assert not (tmp_path / "out").exists()
