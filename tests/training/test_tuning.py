"""Tuning: what it trains on, what it chooses, that it goes on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from trainings import TINY, tiny

from klif_sj import cli
from klif_sj.training.data import batches
from klif_sj.training.divergence import DivergenceError
from klif_sj.training.reports import tuning
from klif_sj.training.reports.tuning import Tuned, Tuning

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_thread")]

QUIET = Console(quiet=True)
HERE: dict[str, Any] = {"data_root": Path("data"), "accelerator": "cpu"}
GRID = {"learning_rate": [1e-4, 1e-2]}


def small(out: Path, **given: Any) -> Tuning:
    """Whatever is not given, one seed of KLIF with either value of :data:`GRID`."""
    asked = {"recipe": tiny(epochs=2, validation=0.2), "neurons": ("klif",), "grid": GRID, "seeds": (3,)} | given
    return Tuning(out=out, **asked)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were read from the data set."""
    splits, load = [], batches.load

    def recorded(name: str, root: Path, split: str, time_steps: int | None) -> Any:
        splits.append(split)
        return load(name, root, split, time_steps)

    monkeypatch.setattr(batches, "load", recorded)
    return splits


def test_the_better_value_is_chosen_without_the_test_set(tmp_path: Path, read: list[str]) -> None:
    recipe = tiny(epochs=2, validation=0.2, width=1 / 16, batch_size=48)
    tuned = small(tmp_path, recipe=recipe, neurons=("lif", "klif*")).run(QUIET, command="klif-sj tune", **HERE)
    assert read == ["train"]
    assert tuned == Tuned.read(tmp_path / "tuned.json")
    found = tuned.found
    assert (found["recipe"]["name"], found["seeds"], found["grid"]) == ("digits", [3], GRID)
    assert list(found["tried"]) == ["lif", "klif-star"]
    for neuron, results in found["tried"].items():
        for result, rate in zip(results, GRID["learning_rate"], strict=True):
            run = json.loads((tmp_path / "runs" / f"{neuron}-learning-rate{rate:g}-seed3" / "result.json").read_text())
            assert (run["training_inputs"], run["validation_inputs"]) == (1149, 288)
            assert "test_accuracy" not in run
            assert result["setting"] == {"learning_rate": rate}
            assert result["of_each_seed"] == [100 * run["validation_accuracy"]]
            assert result["validation_accuracy"] == 100 * run["history"][-1]["validation_accuracy"]
        accuracies = [result["validation_accuracy"] for result in results]
        assert accuracies[0] < accuracies[1]
        assert found["best"][neuron] == {"learning_rate": 1e-2}
    assert "| learning rate 0.01 | **" in tuned.table()


def test_seeds_are_averaged_and_fields_combined(tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-3, 1e-2], "batch_size": [480, 240]}
    found = small(tmp_path, grid=grid, seeds=(0, 1)).run(QUIET, **HERE).found
    results = found["tried"]["klif"]
    assert [tuple(result["setting"].values()) for result in results] == [
        (1e-3, 480),
        (1e-3, 240),
        (1e-2, 480),
        (1e-2, 240),
    ]
    for result in results:
        assert len(result["of_each_seed"]) == 2
        assert result["validation_accuracy"] == pytest.approx(sum(result["of_each_seed"]) / 2)
    best = max(results, key=lambda result: result["validation_accuracy"])
    assert found["best"] == {"klif": best["setting"]}


def test_an_interrupted_tuning_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[float] = []
    run = tuning.TrainingRun.run

    def interrupted(self: Any, console: Any = None) -> Any:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(self.recipe.learning_rate)
        return run(self, console)

    monkeypatch.setattr(tuning.TrainingRun, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path).run(QUIET, **HERE)
    assert not (tmp_path / "tuned.json").exists()
    monkeypatch.setattr(tuning.TrainingRun, "run", run)
    fitted = []
    trainer = tuning.TrainingRun._trainer

    def recorded(self: Any, *given: Any, **how: Any) -> Any:
        fitted.append(self.recipe.learning_rate)
        return trainer(self, *given, **how)

    monkeypatch.setattr(tuning.TrainingRun, "_trainer", recorded)
    small(tmp_path).run(QUIET, **HERE)
    assert fitted == [1e-2], "what was finished is not trained again"
    with pytest.raises(ValueError, match="is of another training: batch_size: 240 then, 120 now"):
        small(tmp_path, recipe=tiny(epochs=2, validation=0.2, batch_size=120)).run(QUIET, **HERE)


def test_a_setting_that_diverges_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tuning.TrainingRun.run

    def diverging(self: Any, console: Any = None) -> Any:
        if self.recipe.learning_rate == 1e-2 or self.recipe.neuron == "lif":
            raise DivergenceError("step 1: the loss is nan")
        return run(self, console)

    monkeypatch.setattr(tuning.TrainingRun, "run", diverging)
    tuned = small(tmp_path).run(QUIET, **HERE)
    assert tuned.found["best"] == {"klif": {"learning_rate": 1e-4}}
    assert "| learning rate 0.01 | diverged |" in tuned.table()
    with pytest.raises(DivergenceError, match="lif: the training diverged with every setting of the grid"):
        small(tmp_path / "lif", neurons=("lif",)).run(QUIET, **HERE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid=learning_rat=1"], "did you mean 'learning_rate'?"),
        (
            ["--grid=learning_rate"],
            "--grid: expected NAME=VALUES, such as learning_rate=1e-4,1e-3, got 'learning_rate'",
        ),
        (["--grid=seed=1,2"], "grid: expected settings of a training, such as learning_rate, got 'seed'"),
        (["--grid=learning_rate=1e-3,-1"], "learning_rate: expected a positive number, got -1"),
        (["--grid=epochs=1", "--grid=epochs=2"], "--grid: expected each field once, got epochs twice"),
        (["--grid=epochs=1,2", "--seeds=1,1"], "seeds: expected each of them once, got 1, 1"),
        (["--grid=epochs=1,2", "--neurons=lif,kilf"], "did you mean 'klif'?"),
        (["--grid=epochs=1,2", "--neurons="], "expected at least one neuron"),
        (["--grid=epochs=1,2", "--validation=1437"], "leaves some of each class on either side, got 1437"),
        (["--grid=epochs=1,2", "--validation=0"], "validation: expected a fraction or number of training samples"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert cli.main(["tune", "--recipe=digits", f"--out={out}", "--accelerator=cpu", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (out / "tuned.json").exists()


def test_the_commands_work_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"--set={name}={value}" for name, value in {**TINY, "epochs": 1}.items()]
    out = tmp_path / "tuning"
    tune = ["tune", "--recipe=digits", "--grid=learning_rate=1e-3,1e-2", "--accelerator=cpu", f"--out={out}", *settings]
    assert cli.main(tune) == 0
    printed = capsys.readouterr().out
    assert "validation accuracy" in printed
    again = ["reproduce", "--recipe=digits", f"--tuned={out / 'tuned.json'}", "--accelerator=cpu", *settings]
    assert cli.main([*again, f"--out={tmp_path / 'page'}"]) == 0
    results = [json.loads(file.read_text()) for file in (tmp_path / "page" / "results").iterdir()]
    best = Tuned.read(out / "tuned.json").found["best"]
    assert {found["recipe"]["neuron"]: found["recipe"]["learning_rate"] for found in results} == {
        neuron: setting["learning_rate"] for neuron, setting in best.items()
    }
