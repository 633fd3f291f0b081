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

import numpy as np
import pytest
import torch
from tolerance import assert_close, assert_equal
from trainings import tiny

from klif_sj import KLIFNode
from klif_sj.training.classifier import SpikingClassifier, recorded_rates
from klif_sj.training.data.batches import load
from klif_sj.training.reports import comparison, pictures
from klif_sj.training.reports.comparison import Comparison, Report, results_table
from klif_sj.training.reports.summary import Difference
from klif_sj.training.run import load_checkpoint
from klif_sj.training.step_cost import measure_step

PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = ["encoder", "conv1", "fc1", "decoder"]
SEEDS = (3, 5)
TINY: dict[str, Any] = {"epochs": 4, "time_steps": 3, "width": 1 / 16, "batch_size": 64, "learning_rate": 1e-2}


def compare(
    out: Path,
    neurons: tuple[str, ...] = ("lif", "klif"),
    seeds: tuple[int, ...] = (3,),
    resume: bool = False,
    **given: Any,
) -> Comparison:
    return Comparison(
        tiny(**{**TINY, **given}),
        neurons,
        seeds,
        out,
        data_root=Path("data"),
        accelerator="cpu",
        resume=resume,
        command="klif-sj compare",
    )


def checkpoint(out: Path, neuron: str, seed: int = 3) -> Path:
    return out / "runs" / f"{neuron}-seed{seed}" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module", autouse=True)
def _one_step_is_measured() -> Iterator[None]:
    """Times do not matter here, so one step is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "measure_step", partial(measure_step, min_seconds=0))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A comparison with two seeds that ran to its end."""
    out = tmp_path_factory.mktemp("finished")
    return out, compare(out, seeds=SEEDS).run()


# What is reported


def test_report_holds_what_was_logged(finished: tuple[Path, Report]) -> None:
    out, returned = finished
    found = json.loads((out / "report.json").read_text())
    assert found == returned
    assert found["recipe"] == json.loads((out / "comparison.json").read_text())
    assert found["network"] == "(8C3+8C3+8C3)(enc)-8C3-MP2-128FC-(100FC-AP10)(dec)"
    assert list(found["neurons"]) == ["lif", "klif"]
    assert found["seeds"] == list(SEEDS)
    for name, result in found["neurons"].items():
        last = []
        for seed, run in zip(SEEDS, result["runs"], strict=True):
            saved = torch.load(checkpoint(out, name, seed), weights_only=True)
            assert run["seed"] == seed
            assert run["history"] == saved["callbacks"]["History"]["epochs"]
            assert [row["epoch"] for row in run["history"]] == [1, 2, 3, 4]
            assert run["test_accuracy"] == run["history"][-1]["test_accuracy"]
            last.append(run["history"][-1])
        assert result["test_accuracy"] == pytest.approx(50 * sum(row["test_accuracy"] for row in last))
        assert result["deviation"] == pytest.approx(
            100 * abs(last[0]["test_accuracy"] - last[1]["test_accuracy"]) / 2**0.5
        )
        for quantity in ("firing_rate", "k"):
            means = {layer: sum(row.get(f"{quantity}/{layer}", 0) for row in last) / 2 for layer in LAYERS}
            assert result[quantity] == pytest.approx(means if quantity == "firing_rate" or name == "klif" else {})
        assert all(0 <= rate <= 1 for rate in result["firing_rate"].values())
        assert result["parameters"] == sum(
            value.numel() for key, value in saved["state_dict"].items() if "running" not in key and "num_ba" not in key
        )
        assert result["step_seconds"] > 0
        assert result["step_peak_bytes"] > 0
    lif, klif = found["neurons"].values()
    assert (lif["backend"], klif["backend"]) == ("SpikingJelly", "torch")
    assert lif["difference"] is None
    assert klif["difference"]["mean"] == pytest.approx(klif["test_accuracy"] - lif["test_accuracy"])
    assert klif["difference"]["pairs"] == 2
    assert found["conclusion"].startswith("Over 2 seeds, at this size")


def test_logged_accuracy_rates_and_k_are_those_of_the_saved_network(finished: tuple[Path, Report]) -> None:
    out, found = finished
    _, net = load_checkpoint(checkpoint(out, "klif"))
    images, labels = load("digits", Path(), "test")
    with torch.no_grad(), recorded_rates(net) as measured:
        rates = net.eval()(images)
    result = found["neurons"]["klif"]["runs"][0]
    last = result["history"][-1]
    assert result["test_accuracy"] == pytest.approx((rates.argmax(1) == labels).double().mean().item(), rel=1e-6)
    for layer in LAYERS:
        assert last[f"firing_rate/{layer}"] == pytest.approx(measured[layer].item(), rel=1e-5)
    ks = [last[f"k/{layer}"] for layer in LAYERS]
    assert ks == [value.item() for value in _ks(net)]
    assert all(k != 1 for k in ks), "every k has learned"


def _ks(net: torch.nn.Module) -> list[torch.Tensor]:
    return [module.k.detach() for module in net.modules() if isinstance(module, KLIFNode)]


def test_markdown_and_pictures_show_the_results(finished: tuple[Path, Report]) -> None:
    out, found = finished
    text = (out / "report.md").read_text()
    lif, klif = found["neurons"].values()
    assert (
        f"| test accuracy, % | {lif['test_accuracy']:.2f} ± {lif['deviation']:.2f} | {klif['test_accuracy']:.2f}"
        in text
    )
    # Whether there is an interval depends on the processor: both seeds may differ by as many images.
    assert f"| less lif's, points | – | {Difference(**klif['difference'])} |" in text
    assert f"| k, fc1 | – | {klif['k']['fc1']:.4f} |" in text
    assert "one image is 0.28 points" in text
    assert f"**{found['conclusion']}**" in text
    assert "\n    klif-sj compare\n" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == found["pictures"] == ["accuracy.png", "k.png", "firing_rate.png"]
    assert all((out / picture).read_bytes().startswith(PNG) for picture in pictures)


def test_table_has_a_row_for_each_layer(finished: tuple[Path, Report]) -> None:
    _, found = finished
    head, _, *rows = results_table(found).splitlines()
    assert head == "|  | lif | klif |"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        "test accuracy, %",
        "of each seed",
        "less lif's, points",
        *(f"firing rate, {layer}" for layer in LAYERS),
        *(f"k, {layer}" for layer in LAYERS),
        "time a step, ms",
        "peak memory, MiB",
        "backend",
    ]


def test_pictures_show_means_bands_and_seeds(finished: tuple[Path, Report]) -> None:
    runs = {name: result["runs"] for name, result in finished[1]["neurons"].items()}
    curves, dots = pictures._accuracy(runs).axes
    for place, (name, each) in enumerate(runs.items()):
        line, band, seeds = curves.lines[place], curves.collections[place], dots.collections[place]
        accuracies = 100 * np.array([[row["test_accuracy"] for row in run["history"]] for run in each])
        assert line.get_label() == name
        assert_close(torch.tensor(line.get_ydata()), torch.tensor(accuracies.mean(0)))
        half = np.abs(accuracies[0] - accuracies[1]) / 2**0.5
        assert band.get_paths()[0].get_extents().ymax == pytest.approx((accuracies.mean(0) + half).max())
        assert seeds.get_offsets()[:, 1].tolist() == pytest.approx(accuracies[:, -1])
    k_lines = pictures._k({"klif": runs["klif"]}).axes[0].lines
    for line, layer in zip(k_lines, LAYERS, strict=True):
        ks = np.array([[row[f"k/{layer}"] for row in run["history"]] for run in runs["klif"]])
        assert_close(torch.tensor(line.get_ydata()), torch.tensor(ks.mean(0)))
    bars = pictures._firing_rates(runs).axes[0].patches
    rates = [result["firing_rate"][layer] for result in finished[1]["neurons"].values() for layer in LAYERS]
    assert [bar.get_height() for bar in bars] == pytest.approx(rates)


def test_no_picture_of_k_where_no_neuron_has_one(finished: tuple[Path, Report], tmp_path: Path) -> None:
    (tmp_path / "k.png").write_bytes(b"of an earlier comparison")
    lif = {"lif": finished[1]["neurons"]["lif"]["runs"][:1]}
    assert pictures.draw_neurons(lif, tmp_path) == ["accuracy.png", "firing_rate.png"]
    assert not (tmp_path / "k.png").exists()


def test_both_neurons_learn(finished: tuple[Path, Report]) -> None:
    for run in (run for result in finished[1]["neurons"].values() for run in result["runs"]):
        first, *_, last = run["history"]
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
    compare(tmp_path, epochs=2).run()
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
        compare(tmp_path, **({} if given is None else {"threads": given})).run()
    assert seen == {used}
    assert torch.get_num_threads() == before


def test_a_step_is_measured_on_as_many_images_as_the_report_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test set's 360 images would come in batches of 45."""
    sizes, measure = [], comparison.measure_step
    monkeypatch.setattr(
        comparison, "measure_step", lambda module, *batch: sizes.append(len(batch[0])) or measure(module, *batch)
    )
    compare(tmp_path, epochs=1, batch_size=50).run()
    assert sizes == [50, 50]


# Interruption and resumption


def assert_same_training(resumed: Path, uninterrupted: Path, neurons: list[str]) -> None:
    """The same numbers in every epoch, and the same weights to the last bit."""
    reports = [json.loads((out / "report.json").read_text())["neurons"] for out in (resumed, uninterrupted)]
    assert list(reports[0]) == neurons
    for name in neurons:
        assert reports[0][name]["runs"][0] | {"seconds": 0} == reports[1][name]["runs"][0] | {"seconds": 0}
        weights, expected = (
            torch.load(checkpoint(out, name), weights_only=True)["state_dict"] for out in (resumed, uninterrupted)
        )
        for key, value in expected.items():
            assert_equal(weights[key], value, f"{name}: {key}")


def test_interrupted_comparison_resumes_as_if_uninterrupted(
    finished: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        compare(tmp_path).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "report.json").exists()
    with pytest.raises(ValueError, match="holds an unfinished comparison. Add --resume"):
        compare(tmp_path)
    monkeypatch.setattr(SpikingClassifier, "training_step", counted)
    compare(tmp_path, resume=True).run()
    assert trained == [1] * 23 + [2] * 23 + [3] * 23, "only the epochs that KLIF lacked"
    assert_same_training(tmp_path, finished[0], ["lif", "klif"])


def test_killed_comparison_resumes_as_if_uninterrupted(finished: tuple[Path, Report], tmp_path: Path) -> None:
    options = {name.replace("_", "-"): value for name, value in {**TINY, "seeds": 3}.items()}
    command = [sys.executable, "-m", "klif_sj", "compare", "--neurons=klif", "--backend=torch", "--device=cpu"]
    command += [*(f"--{name}={value}" for name, value in options.items()), f"--out={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = checkpoint(tmp_path, "klif")
    while not file.exists():
        assert process.poll() is None, "it ended without a checkpoint"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(torch.load(file, weights_only=True)["callbacks"]["History"]["epochs"]) < TINY["epochs"]
    compare(tmp_path, ("klif",), resume=True).run()
    assert_same_training(tmp_path, finished[0], ["klif"])


def test_resuming_refuses_other_settings_and_broken_checkpoints(finished: tuple[Path, Report]) -> None:
    out, _ = finished
    with pytest.raises(ValueError, match="begun with other settings: epochs: 4 then, 5 now"):
        compare(out, epochs=5, resume=True)
    file = checkpoint(out, "klif")
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"klif-seed3.*last\.ckpt cannot be read"):
            compare(out, resume=True)
    finally:
        file.write_bytes(whole)


def test_a_new_comparison_takes_the_place_of_a_finished_one(tmp_path: Path) -> None:
    tiny_one = {"epochs": 1, "batch_size": 480}
    compare(tmp_path, ("klif",), **tiny_one).run()
    compare(tmp_path, ("lif",), **tiny_one, learning_rate=1e-3).run()
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["lif-seed3"]
    assert json.loads((tmp_path / "report.json").read_text())["recipe"]["learning_rate"] == 1e-3


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "precious").write_text("")
    with pytest.raises(ValueError, match="runs is no comparison's"):
        compare(tmp_path)
    assert (tmp_path / "runs" / "precious").exists()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        compare(file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": (1, 2, 1)}, "seeds: expected each of them once, got 1, 2, 1"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"neurons": ()}, "neurons: expected at least one name, got none"),
        ({"validation": 0.1}, "validation: a comparison reports test accuracies, got 0.1"),
        ({"precision": "bf16-mixed"}, "precision: a comparison is in 32-true, got 'bf16-mixed'"),
    ],
)
def test_a_comparison_refuses(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_before_everything_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at most the 1437 training images of digits, got 1438"):
        compare(tmp_path / "out", batch_size=1438)
    assert not (tmp_path / "out").exists()
