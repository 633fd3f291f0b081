"""Reproducing a table: which runs it plans, what they leave behind, what is skipped, resumed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from klif_sj import cli
from klif_sj.training.divergence import DivergenceError
from klif_sj.training.recipe import load_recipe
from klif_sj.training.reports import reproduction as reproduction
from klif_sj.training.reports.paper_tables import TABLES, Figure
from klif_sj.training.reports.reproduction import plan, reproduce
from klif_sj.training.reports.reproduction_page import read_results, write_page
from klif_sj.training.reports.tuning import Tuned

pytestmark = pytest.mark.once

QUIET = Console(quiet=True)
DIGITS = [Figure("LIF", "digits", "lif"), Figure("KLIF", "digits", "klif")]
TINY: dict[str, Any] = {"epochs": 2, "time_steps": 2, "width": 1 / 32, "batch_size": 256, "backend": "torch"}
HERE: dict[str, Any] = {"data_root": Path("data"), "accelerator": "cpu", "command": "klif-sj reproduce --table 2"}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the trainings that were run, in their order."""
    folders = []
    run = reproduction.TrainingRun.run

    def recorded(self: Any, console: Any = None) -> Any:
        folders.append(self.out)
        return run(self, console)

    monkeypatch.setattr(reproduction.TrainingRun, "run", recorded)
    return folders


# The plan


def test_a_plan_runs_all_neurons_of_one_seed_before_the_next() -> None:
    runs = plan(TABLES[2].select(datasets=["fashion-mnist"]), [0, 7], epochs=3, width=0.125)
    size = "klif-fashion-mnist-epochs3-width0.125"
    assert list(runs) == [f"{size}-{neuron}-seed{seed}" for seed in (0, 7) for neuron in ("lif", "klif")]
    first = runs[f"{size}-lif-seed0"]
    assert first == load_recipe("klif-fashion-mnist").override(neuron="lif", epochs=3, width=0.125, seed=0)


def test_what_equals_the_paper_is_as_published() -> None:
    published = plan(TABLES[2].select(datasets=["mnist"]), [0])
    assert plan(TABLES[2].select(datasets=["mnist"]), [0], epochs=100, width=1.0) == published
    assert list(published) == ["klif-mnist-lif-seed0", "klif-mnist-klif-seed0"]


def test_tables_share_their_runs() -> None:
    shared = plan(TABLES[3].select(), [0]).keys() & plan(TABLES[5].select(), [0]).keys()
    assert shared == {
        f"klif-{network}-{neuron}-seed0" for network in ("vgg16", "resnet18") for neuron in ("lif", "klif")
    }


@pytest.mark.parametrize(
    ("seeds", "given", "message"),
    [
        ([], {}, "seeds: expected at least one, got none"),
        ([0], {"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ([0], {"dataset": "digits"}, "dataset: the table chooses it"),
        ([0], {"seed": 1}, "seed: the table chooses it"),
        ([0], {"validation": 0.1}, "validation: the table chooses it"),
        ([0, 1, 0], {}, "seeds: expected each of them once, got 0, 1, 0"),
        ([0], {"epoch": 1}, "did you mean 'epochs'"),
    ],
)
def test_plan_refuses(seeds: list[int], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(DIGITS, seeds, **given)


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real, tiny trainings of LIF and KLIF on digits."""
    out = tmp_path_factory.mktemp("reproduction")
    reproduce(plan(DIGITS, [0], **TINY), out, QUIET, **HERE)
    return out


def test_runs_leave_results_of_which_the_page_is_made(finished: Path) -> None:
    lif, klif = read_results(finished)
    assert [lif.recipe.neuron, klif.recipe.neuron] == ["lif", "klif"]
    for result in (lif, klif):
        found = result.found
        assert found["command"] == HERE["command"]
        assert found["history"][-1]["test_accuracy"] == found["test_accuracy"]
        assert [row["epoch"] for row in found["history"]] == [1, 2]
        assert "torch" in found["environment"]
    assert "k/encoder" in klif.found["history"][0]
    assert "k/encoder" not in lif.found["history"][0]
    text = (finished / "README.md").read_text()
    assert f"| klif | 0 | {100 * klif.found['test_accuracy']:.2f} |" in text
    assert "## digits: T 2, epochs 2, batch size 256, width 0.03125\n" in text
    assert "    klif-sj reproduce --table 2\n" in text
    assert len(list((finished / "pictures").glob("*.svg"))) == 3


def test_what_is_finished_is_not_run_again(finished: Path, trained: list[Path]) -> None:
    before = {path: path.read_bytes() for path in (finished / "results").iterdir()}
    reproduce(plan(DIGITS, [0], **TINY), finished, QUIET, **HERE)
    assert trained == []
    assert {path: path.read_bytes() for path in (finished / "results").iterdir()} == before


def test_an_interrupted_reproduction_goes_on_to_the_same_results(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan(DIGITS, [0], **TINY)
    with monkeypatch.context() as patch:
        saved = reproduction.TrainingRun.run

        def interrupted(self: Any, console: Any = None) -> Any:
            if self.recipe.neuron == "klif":
                raise KeyboardInterrupt
            return saved(self, console)

        patch.setattr(reproduction.TrainingRun, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce(runs, tmp_path, QUIET, **HERE)
    assert [result.recipe.neuron for result in read_results(tmp_path)] == ["lif"]
    assert "| lif | 0 |" in (tmp_path / "README.md").read_text()
    reproduce(runs, tmp_path, QUIET, **HERE)
    for ours, whole in zip(read_results(tmp_path), read_results(finished), strict=True):
        assert ours.name == whole.name
        assert ours.found["history"] == whole.found["history"]


def test_a_missing_data_set_is_said_after_the_others_have_run(
    tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run = reproduction.TrainingRun

    def refusing(recipe: Any, *args: Any, **how: Any) -> Any:
        if recipe.neuron == "lif":
            raise FileNotFoundError("MNIST is not in data/MNIST/raw")
        return make_run(recipe, *args, **how)

    monkeypatch.setattr(reproduction, "TrainingRun", refusing)
    with pytest.raises(FileNotFoundError, match="MNIST is not in data/MNIST/raw"):
        reproduce(plan(DIGITS, [0], **{**TINY, "epochs": 1}), tmp_path, QUIET, **HERE)
    assert [path.name.partition("-batch")[0] for path in trained] == ["digits-T2-epochs1"]
    assert [result.recipe.neuron for result in read_results(tmp_path)] == ["klif"]


def test_a_run_that_diverges_leaves_the_others_their_turn(
    tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = reproduction.TrainingRun.run

    def diverging(self: Any, console: Any = None) -> Any:
        if self.recipe.neuron == "lif":
            raise DivergenceError("step 1: the loss is nan")
        return run(self, console)

    monkeypatch.setattr(reproduction.TrainingRun, "run", diverging)
    with pytest.raises(DivergenceError, match=r"digits-.*-lif-seed0: step 1: the loss is nan"):
        reproduce(plan(DIGITS, [0], **{**TINY, "epochs": 1}), tmp_path, QUIET, **HERE)
    assert [result.recipe.neuron for result in read_results(tmp_path)] == ["klif"]


def test_a_note_beside_the_results_is_on_the_page(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    (size,) = {result.size for result in read_results(finished)}
    (tmp_path / "copy" / "results" / f"{size}.md").write_text("The learning rate was chosen on training images.\n")
    write_page(tmp_path / "copy")
    before, after = (folder.joinpath("README.md").read_text() for folder in (finished, tmp_path / "copy"))
    assert "chosen on training images." not in before
    assert after.replace("The learning rate was chosen on training images.\n\n", "") == before


def test_a_result_of_another_recipe_is_not_taken_for_this_one(finished: Path, tmp_path: Path) -> None:
    runs = plan(DIGITS, [0], **TINY)
    (tmp_path / "results").mkdir()
    for name in runs:
        found = json.loads((finished / "results" / f"{name}.json").read_text())
        found["recipe"]["learning_rate"] = 0.5
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"is of another recipe \(learning_rate: 0.5 then, 0.002 now\)"):
        reproduce(runs, tmp_path, QUIET, **HERE)


# Tuned values


def tuned_file(folder: Path, recipe: str = "digits", **best: dict[str, Any]) -> Path:
    """What a tuning writes."""
    tried = {
        neuron: [
            {"setting": setting, "validation_accuracy": accuracy}
            for setting, accuracy in (({"learning_rate": 5e-3}, 80.0), ({"learning_rate": 1e-2}, None))
        ]
        for neuron in best
    }
    found = {
        "recipe": load_recipe(recipe).as_dict(),
        "best": best,
        "tried": tried,
        "command": "klif-sj tune --recipe digits",
    }
    file = folder / "tuned.json"
    file.write_text(json.dumps(found))
    return file


def test_neurons_with_tuned_values_stay_together(tmp_path: Path) -> None:
    tuned = Tuned.read(tuned_file(tmp_path, lif={"learning_rate": 1e-2}, klif={"learning_rate": 5e-3}))
    runs = plan(DIGITS, [0], tuned, **{**TINY, "epochs": 1})
    size = "digits-T2-epochs1-batch-size256-tuned-learning-rate-width0.03125"
    assert list(runs) == [f"{size}-lif-seed0", f"{size}-klif-seed0"]
    assert [(recipe.learning_rate, recipe.tuned) for recipe in runs.values()] == [
        (1e-2, ("learning_rate",)),
        (5e-3, ("learning_rate",)),
    ]
    reproduce(runs, tmp_path / "out", QUIET, tuned, **HERE)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "learning rate tuned instead of 0.002" in page
    assert "| learning rate 0.005 | 80.00 | **80.00** |\n| learning rate 0.01 | **diverged** | diverged |" in page
    assert "    klif-sj tune --recipe digits\n" in page
    assert f"Chosen for each neuron after {load_recipe('digits').epochs} epochs, on training samples put aside" in page
    # The file that is kept beside the results is read as the first one was.
    again = Tuned.read(tmp_path / "out" / "tuning" / f"{size}.json")
    assert plan(DIGITS, [0], again, **{**TINY, "epochs": 1}) == runs


@pytest.mark.parametrize(
    ("best", "recipe", "given", "message"),
    [
        ({"lif": {}}, "klif-mnist", {}, r"tuned\.json: the recipe klif-mnist was tuned, not digits"),
        ({"lif": {}}, "digits", {}, r"tuned\.json: lif were tuned, not klif"),
        (
            {"lif": {"learning_rate": 1.0}, "klif": {"learning_rate": 2.0}},
            "digits",
            {"learning_rate": 3.0},
            r"learning_rate: expected it either given or from .*tuned\.json, got both",
        ),
    ],
)
def test_tuned_values_of_something_else_are_refused(
    tmp_path: Path, best: dict[str, Any], recipe: str, given: dict[str, Any], message: str
) -> None:
    tuned = Tuned.read(tuned_file(tmp_path, recipe, **best))
    with pytest.raises(ValueError, match=message):
        plan(DIGITS, [0], tuned, **given)


@pytest.mark.parametrize("text", ["{", "[]", '{"recipe": {}, "best": {}}', '{"best": {}}'])
def test_a_file_that_no_tuning_wrote_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json: expected what klif-sj tune writes"):
        Tuned.read(tmp_path / "tuned.json")


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table=2", "--dataset=fashon-mnist"], "got 'fashon-mnist'; did you mean 'fashion-mnist'?"),
        (["--table=2", "--neurons=klif-star"], "neuron: expected one of lif, klif, which Table 2 has"),
        (["--table=3", "--network=vgg-16"], "did you mean 'vgg16'?"),
        (["--recipe=klif-minst"], "did you mean 'klif-mnist'?"),
        (["--recipe=klif-mnist", "--dataset=mnist"], "--dataset and --network choose from a table"),
        (["--table=2", "--tuned=none.json"], "none.json"),
        (["--table=2", "--seeds=0,0"], "seeds: expected each of them once, got 0, 0"),
        (["--table=2", "--epochs=0"], "epochs: expected an integer of at least 1, got 0"),
        (["--table=2", "--set=learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--table=2", "--accelerator=gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--table=2", "--accelerator=cpu", "--backend=cupy"], "backend 'cupy'"),
    ],
)
def test_the_command_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert cli.main(["reproduce", f"--out={out}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("klif-sj: error: ")
    assert message in error
    assert not (out / "results").exists()


@pytest.mark.parametrize("arguments", [["--table=6"], ["--table=2", "--seeds=a"], ["--table=2", "--recipe=digits"], []])
def test_the_command_says_how_it_is_used(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", *arguments])
    assert "usage: klif-sj reproduce" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "quiet"), [("0", False), ("1", True)])
def test_of_several_processes_the_first_one_talks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, quiet: bool
) -> None:
    seen = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(reproduction, "reproduce", lambda runs, out, console, tuned, **how: seen.append(console.quiet))
    assert cli.main(["reproduce", "--table=2", f"--out={tmp_path}"]) == 0
    assert seen == [quiet]
