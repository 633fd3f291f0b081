"""The page of a reproduction, from results written by hand: figures, spread, labels, empty cells, pictures."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from klif_sj.training.recipe import load_recipe
from klif_sj.training.reports import reproduction_page
from klif_sj.training.reports.paper_tables import TABLES, changes, run_name, size_name
from klif_sj.training.reports.reproduction_page import read_results, write_page

pytestmark = pytest.mark.once

DOCS = Path(__file__).parents[2] / "docs" / "reproduction"
LAYERS = ("encoder", "decoder")


def result(recipe: str, neuron: str, accuracies: list[float], **given: Any) -> dict[str, Any]:
    """What a run writes, with made-up values; it has one layer's k at 1 + epoch / 10, the other's at 1."""
    history = [
        {
            "epoch": epoch,
            "train_loss": 0.1,
            "test_accuracy": accuracy,
            **{f"firing_rate/{layer}": 0.1 * epoch for layer in LAYERS},
            **({"k/encoder": 1 + epoch / 10, "k/decoder": 1.0} if neuron.startswith("klif") else {}),
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    return {
        "recipe": load_recipe(recipe).override(neuron=neuron, **given).as_dict(),
        "history": history,
        "test_accuracy": accuracies[-1],
        "parameters": 1234,
        "precision": "32-true",
        "notation": "8C3-FC10",
        "seconds": 61.4,
        "command": "klif-sj reproduce --table 2",
        "environment": {"torch": "2.11.0", "cpu": "a fixture"},
    }


def write(out: Path, *results: dict[str, Any]) -> None:
    (out / "results").mkdir(parents=True, exist_ok=True)
    for number, found in enumerate(results):
        (out / "results" / f"result{number}.json").write_text(json.dumps(found))


def rows(out: Path, table: int) -> list[list[str]]:
    """The cells of a table of the page, without its head."""
    section = (out / "README.md").read_text().split(f"## Table {table}:")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def row(out: Path, table: int, dataset: str, neuron: str) -> list[str]:
    (found,) = (cells for cells in rows(out, table) if (cells[0], cells[2]) == (dataset, neuron))
    return found[3:]


# The paper's figures


@pytest.mark.parametrize(
    ("table", "neuron", "published"),
    [
        (2, "LIF", [99.61, 94.28, 91.02, 99.48, 68.4, 93.06]),
        (2, "KLIF", [99.61, 94.35, 92.52, 99.57, 70.9, 94.1]),
        (3, "LIF", [78.45, 85.24]),
        (3, "only with k", [82.96, 87.2]),
        (3, "only with ReLU", [81.04, 86.66]),
        (3, "KLIF, without coding layers", [85.53, 89.12]),
        (3, "KLIF, with coding layers", [86.64, 89.88]),
        (4, "KLIF", [99.61, 94.35, 92.52, 99.57, 70.9, 94.1]),
        (4, "KLIF*", [99.6, 94.31, 91.93, 99.27, 70.6, 94.1]),
        (5, "LIF", [78.45, 85.24]),
        (5, "KLIF (ReLU)", [85.53, 89.12]),
        (5, "KLIF (CELU)", [84.55, 88.7]),
        (5, "KLIF (leaky ReLU)", [85.9, 89.11]),
    ],
)
def test_tables_are_the_papers(table: int, neuron: str, published: list[float]) -> None:
    found = [figure.as_published() for figure in TABLES[table].figures if figure.row == neuron]
    assert [recipe.published_accuracy for recipe in found] == published
    wanted = (
        ["mnist", "fashion-mnist", "cifar10", "n-mnist", "cifar10-dvs", "dvs-gesture"]
        if table in (2, 4)
        else ["vgg16", "resnet18"]
    )
    assert [recipe.dataset if table in (2, 4) else recipe.network for recipe in found] == wanted


def test_ablation_runs_as_in_the_paper() -> None:
    for table in (3, 5):
        for figure in TABLES[table].figures:
            recipe = figure.as_published()
            assert (recipe.dataset, recipe.time_steps, recipe.epochs) == ("cifar10", 6, 100)
            assert recipe.coding is (figure.row == "KLIF, with coding layers")


def test_select_filters_and_keeps_the_order() -> None:
    chosen = TABLES[2].select(datasets=["fashion-mnist"], neurons=["klif", "lif"])
    assert [(figure.recipe, figure.neuron) for figure in chosen] == [
        ("klif-fashion-mnist", "lif"),
        ("klif-fashion-mnist", "klif"),
    ]
    assert len(TABLES[2].select()) == 12
    assert [figure.row for figure in TABLES[3].select(networks=["vgg16"], neurons=["klif"])] == [
        "KLIF, without coding layers",
        "KLIF, with coding layers",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"datasets": ["fashon-mnist"]}, "dataset: .* Table 4 has, got 'fashon-mnist'; did you mean 'fashion-mnist'"),
        ({"neurons": ["lif"]}, "neuron: expected one of klif, klif-star, which Table 4 has, got 'lif'"),
        ({"networks": ["vgg16"]}, "network: expected one of klif-mnist"),
        ({"datasets": ["mnist"], "networks": ["klif-cifar10"]}, "Table 4 has no figure of these"),
    ],
)
def test_select_refuses(names: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TABLES[4].select(**names)


# Names and labels


def test_a_run_is_named_after_all_in_which_it_differs() -> None:
    published = load_recipe("klif-cifar10").override(neuron="lif", seed=3, backend="torch", threads=1)
    assert changes(published) == {}
    assert run_name(published) == "klif-cifar10-lif-seed3"
    small = published.override(width=0.125, epochs=3, augmentations=())
    assert changes(small) == {
        "epochs": (3, 200),
        "augmentations": ((), published.augmentations),
        "width": (0.125, 1.0),
    }
    assert size_name(small) == "klif-cifar10-epochs3-augmentationsnone-width0.125"


def test_what_was_not_run_is_empty(tmp_path: Path) -> None:
    write_page(tmp_path)
    for table in TABLES:
        assert len(rows(tmp_path, table)) == len(TABLES[table].figures)
        assert all(cells[4:] == ["", "", ""] and float(cells[3]) > 60 for cells in rows(tmp_path, table))
    assert not list((tmp_path / "pictures").iterdir())


def test_mean_spread_and_label_stand_beside_the_papers(tmp_path: Path) -> None:
    small = {"epochs": 2, "width": 0.125, "time_steps": 4}
    write(
        tmp_path,
        result("klif-fashion-mnist", "klif", [0.5, 0.90], seed=1, **small),
        result("klif-fashion-mnist", "klif", [0.5, 0.91], seed=0, **small),
        result("klif-fashion-mnist", "lif", [0.5, 0.89], **small),
        result("klif-mnist", "lif", [0.9, 0.9955]),
        result("klif-mnist", "klif", [0.9, 0.9955], learning_rate=1e-3, epochs=200),
    )
    write_page(tmp_path)
    label = "**shorter, smaller**: T 4 instead of 8, epochs 2 instead of 100, width 0.125 instead of 1"
    assert row(tmp_path, 2, "fashion-mnist", "KLIF") == ["94.35", "90.50 ± 0.71", "2", label]
    assert row(tmp_path, 4, "fashion-mnist", "KLIF") == ["94.35", "90.50 ± 0.71", "2", label]
    assert row(tmp_path, 2, "fashion-mnist", "LIF") == ["94.28", "89.00", "1", label]
    assert row(tmp_path, 2, "mnist", "LIF") == ["99.61", "99.55", "1", "as published"]
    assert row(tmp_path, 2, "mnist", "KLIF")[3] == (
        "**different**: epochs 200 instead of 100, learning rate 0.001 instead of 0.0001"
    )
    assert row(tmp_path, 4, "fashion-mnist", "KLIF*") == ["94.31", "", "", ""]


def test_differences_are_those_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    """LIF 90, 91, 92 and KLIF 91, 93, 95 on seeds 0 to 2: 1, 2, 3 points, which is 2 +- 4.303 x 1 / sqrt(3)."""
    for seed, (lif, klif) in enumerate([(0.90, 0.91), (0.91, 0.93), (0.92, 0.95)]):
        pair = (result("klif-mnist", "lif", [lif], seed=seed), result("klif-mnist", "klif", [klif], seed=seed))
        write(tmp_path / str(seed), *pair)
        for number, file in enumerate(sorted((tmp_path / str(seed) / "results").iterdir())):
            (tmp_path / "results").mkdir(exist_ok=True)
            file.rename(tmp_path / "results" / f"{seed}-{number}.json")
    write_page(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| klif | 93.00 ± 2.00 | 3 | +2.00 [-0.48, +4.48] |" in text
    assert "the data do not say whether klif is better or worse than lif." in text


def test_two_sizes_of_one_figure_are_two_rows(tmp_path: Path) -> None:
    write(tmp_path, result("klif-mnist", "lif", [0.9955]), result("klif-mnist", "lif", [0.97], epochs=1))
    write_page(tmp_path)
    found = [cells[4:] for cells in rows(tmp_path, 2) if cells[:3] == ["mnist", "klif-mnist", "LIF"]]
    assert found == [
        ["99.55", "1", "as published"],
        ["97.00", "1", "**shorter**: epochs 1 instead of 100"],
    ]


def test_the_page_shows_pictures_commands_and_environments(tmp_path: Path) -> None:
    write(tmp_path, result("klif-mnist", "klif", [0.9, 0.95]), result("klif-mnist", "lif", [0.9, 0.94]))
    write_page(tmp_path)
    text = (tmp_path / "README.md").read_text()
    shown = re.findall(r"\]\(pictures/(.*?)\)", text)
    assert shown == [f"klif-mnist-{kind}.svg" for kind in ("accuracy", "k", "firing_rate")]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == set(shown)
    assert "| lif | 0 | 94.00 | 1234 | 32-true | 61 | [JSON](results/result1.json) |" in text
    assert "    klif-sj reproduce --table 2\n" in text
    assert text.count("- cpu: a fixture") == 1


def test_a_command_is_shown_once_whatever_the_order_of_its_options(tmp_path: Path) -> None:
    first, second, other = (result("klif-mnist", neuron, [0.9]) for neuron in ("lif", "klif", "klif-star"))
    first["command"] = "klif-sj reproduce --neurons lif,klif --table 2"
    second["command"] = "klif-sj reproduce --table 2 --neurons lif,klif"
    other["command"] = "klif-sj reproduce --table 4"
    write(tmp_path, first, second, other)
    write_page(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("    klif-sj reproduce ") == 2
    assert "    klif-sj reproduce --table 4\n" in text


def test_lif_alone_has_no_picture_of_k(tmp_path: Path) -> None:
    write(tmp_path, result("klif-mnist", "lif", [0.9]))
    write_page(tmp_path)
    assert sorted(path.stem for path in (tmp_path / "pictures").iterdir()) == [
        "klif-mnist-accuracy",
        "klif-mnist-firing_rate",
    ]


def test_pictures_are_of_every_seed_and_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, result("klif-mnist", "klif", [0.8, 0.9]), result("klif-mnist", "klif", [0.6, 0.8], seed=1))
    write_page(tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    drawn = []
    draw = reproduction_page.draw_neurons
    monkeypatch.setattr(
        reproduction_page,
        "draw_neurons",
        lambda neurons, *args, **kw: drawn.append(neurons) or draw(neurons, *args, **kw),
    )
    write_page(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == first
    ((found,),) = (neurons.values() for neurons in drawn)
    assert [[row["test_accuracy"] for row in run["history"]] for run in found] == [[0.8, 0.9], [0.6, 0.8]]
    assert [run["seed"] for run in found] == [0, 1]


# What is refused


@pytest.mark.parametrize("text", ["{", "[]", '{"recipe": {"network": "klif-mnist"}}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, result("klif-mnist", "lif", [0.9]))
    (tmp_path / "results" / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json: expected the result of a run"):
        read_results(tmp_path)


def test_a_readme_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match="is no page of a reproduction"):
        write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"


# What is committed


def test_the_committed_page_is_what_its_results_give(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for folder in ("results", "tuning"):
        if (DOCS / folder).exists():
            shutil.copytree(DOCS / folder, tmp_path / folder, dirs_exist_ok=True)
    write_page(tmp_path)
    assert (DOCS / "README.md").read_text() == (tmp_path / "README.md").read_text()
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {path.name for path in (DOCS / "pictures").glob("*")} == drawn


def test_committed_results_are_named_after_their_runs_and_say_how_they_were_made() -> None:
    for found in read_results(DOCS):
        assert found.name == run_name(found.recipe)
        assert found.found["history"][-1]["test_accuracy"] == found.found["test_accuracy"]
        assert len(found.found["history"]) == found.recipe.epochs
        assert found.found["command"].startswith("klif-sj reproduce ")
        assert found.found["environment"]["torch"]


def claim_rows(out: Path) -> dict[str, list[str]]:
    """The cells after a claim's text, by that text."""
    section = (out / "README.md").read_text().split("## What the papers claim")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in cells}


def test_a_claim_holds_only_where_the_whole_interval_is_on_its_side(tmp_path: Path) -> None:
    """Differences 2, 3, 4 points: 3 +- 4.303 / sqrt(3). ReLU's are -1, 1, 6: too wide. k alone's are negative."""
    for seed, (lif, klif, only_k, only_relu) in enumerate(
        [(0.50, 0.52, 0.40, 0.49), (0.52, 0.55, 0.43, 0.53), (0.51, 0.55, 0.405, 0.57)]
    ):
        accuracies = {"lif": lif, "klif": klif, "klif-only-k": only_k, "klif-only-relu": only_relu}
        for neuron, accuracy in accuracies.items():
            run = result("klif-vgg16", neuron, [accuracy], seed=seed, width=0.125)
            (tmp_path / "results").mkdir(exist_ok=True)
            (tmp_path / "results" / f"{neuron}{seed}.json").write_text(json.dumps(run))
    write_page(tmp_path)
    rows = claim_rows(tmp_path)
    size = "[klif-vgg16: width 0.125](#klif-vgg16-width-0125)"
    assert rows["KLIF is above LIF"] == ["+7.08", "+3.00 [+0.52, +5.48] points", "3", "**holds**", size]
    assert rows["k alone helps: above LIF"][0] == "+4.51"
    assert rows["k alone helps: above LIF"][3] == "**does not hold**"
    assert rows["ReLU alone helps: above LIF"][1:4] == ["+2.00 [-6.96, +10.96] points", "3", "cannot say"]
    assert rows["k ends above 1 in most layers"][0] == "Fig. 5, CIFAR-10 and DVS-Gesture"
    assert rows["k ends above 1 in most layers"][1:4] == ["50 % of the layers", "3", "cannot say"]
    assert rows["KLIF fires more than LIF in most layers"][1:4] == ["0 % of the layers", "3", "**does not hold**"]


def test_one_seed_supports_no_claim(tmp_path: Path) -> None:
    write(tmp_path, result("klif-vgg16", "lif", [0.5]), result("klif-vgg16", "klif", [0.6]))
    write_page(tmp_path)
    assert claim_rows(tmp_path)["KLIF is above LIF"][1:4] == ["+10.00 points", "1", "cannot say, by one seed"]


def test_two_seeds_that_agree_by_chance_decide_nothing(tmp_path: Path) -> None:
    runs = [result("klif-vgg16", neuron, [0.5], seed=seed) for neuron in ("lif", "klif") for seed in (0, 1)]
    write(tmp_path, *runs)
    write_page(tmp_path)
    row = claim_rows(tmp_path)["KLIF fires more than LIF in most layers"]
    assert row[1:4] == ["0 % of the layers", "2", "cannot say"]


def test_clifs_lead_is_compared_over_the_numbers_of_steps(tmp_path: Path) -> None:
    """Leads at T = 1: 0, 1 points; at T = 8: 4, 6; their differences 4, 5: 4.5 +- 12.706 / 2."""
    runs = []
    for steps, leads in {1: (0.0, 0.01), 4: (0.02, 0.02), 8: (0.04, 0.06)}.items():
        for seed, lead in enumerate(leads):
            given = {"seed": seed, "time_steps": steps, "width": 0.125}
            runs += [
                result("clif-cifar10", "clif-baseline", [0.5], **given),
                result("clif-cifar10", "clif", [0.5 + lead], **given),
            ]
    write(tmp_path, *runs)
    write_page(tmp_path)
    row = claim_rows(tmp_path)["CLIF's lead over its authors' LIF grows from T = 1 to T = 8"]
    assert row[1:4] == ["+4.50 [-1.85, +10.85] points", "2", "cannot say"]
    assert row[4].startswith("[clif-cifar10: T 8, width 0.125]")


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ((0.5, 0.6, 0.7), "**holds**"),
        ((0.5, 0.6), "cannot say"),
        ((0.51, 0.61, 0.71), "**does not hold**"),
        ((0.5, 0.6, 0.71), "**does not hold**"),
        ((0.51, 0.59, 0.7), "**does not hold**"),
        ((0.51,), "**does not hold**"),
        ((0.5,), "cannot say, by one seed"),
    ],
)
def test_clif_is_its_baseline_with_one_step(tmp_path: Path, accuracies: tuple[float, ...], verdict: str) -> None:
    baseline = [
        result("clif-cifar10", "clif-baseline", [a], seed=s, time_steps=1) for s, a in enumerate((0.5, 0.6, 0.7))
    ]
    clif = [result("clif-cifar10", "clif", [a], seed=s, time_steps=1) for s, a in enumerate(accuracies)]
    write(tmp_path, *baseline, *clif)
    write_page(tmp_path)
    rows = claim_rows(tmp_path)
    assert "CLIF is above its authors' LIF" not in rows
    row = rows["CLIF and its authors' LIF are equal at T = 1"]
    assert row[3] == verdict
    assert (row[1] == "+0.00 points in each pair") == (accuracies in ((0.5, 0.6, 0.7), (0.5, 0.6)))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.001, 0.002, 0.003), "**holds**"),
        ((0.002, 0.002, 0.002), "**holds**"),
        ((0.02, 0.021, 0.022), "**does not hold**"),
        ((-0.02, -0.021, -0.022), "**does not hold**"),
        ((-0.02, 0.02, 0.001), "cannot say"),
        ((0.001,), "cannot say, by one seed"),
    ],
)
def test_a_scaled_reset_changes_little(tmp_path: Path, differences: tuple[float, ...], verdict: str) -> None:
    write(
        tmp_path,
        *(result("klif-mnist", "klif", [0.9], seed=seed) for seed in range(3)),
        *(result("klif-mnist", "klif-star", [0.9 + d], seed=seed) for seed, d in enumerate(differences)),
    )
    write_page(tmp_path)
    row = claim_rows(tmp_path)["KLIF* changes KLIF's accuracy by less than 1 point"]
    assert (row[0], row[3]) == ("-0.01", verdict)


def test_claims_come_one_after_the_other_at_every_size_and_are_counted(tmp_path: Path) -> None:
    """Each claim comes at both widths; LIF and KLIF have equal rates, and k is above 1 in half of the layers."""
    runs = []
    for width, gain in ((0.25, 0.1), (0.125, -0.1)):
        for seed in range(3):
            runs.append(result("klif-vgg16", "lif", [0.5], seed=seed, width=width))
            runs.append(result("klif-vgg16", "klif", [0.5 + gain], seed=seed, width=width))
    write(tmp_path, *runs)
    write_page(tmp_path)
    text = (tmp_path / "README.md").read_text()
    found = re.findall(r"^\| (KLIF|k ends).*\[klif-vgg16: width (.*?)\]", text, re.MULTILINE)
    assert found == [(claim, width) for claim in ("KLIF", "k ends", "KLIF") for width in ("0.125", "0.25")]
    assert "The table says *holds* 1 times, *does not hold* 3 times, *cannot say* 2 times." in text
    assert re.findall("^## klif.*", text, re.MULTILINE) == ["## klif-vgg16: width 0.125", "## klif-vgg16: width 0.25"]


def test_sections_go_from_few_steps_to_many_and_from_the_papers_values_to_tuned_ones(tmp_path: Path) -> None:
    tuned = load_recipe("klif-vgg16").override(
        neuron="lif", time_steps=4, learning_rate=0.003, tuned=("learning_rate",)
    )
    write(
        tmp_path,
        {**result("klif-vgg16", "lif", [0.5]), "recipe": tuned.as_dict()},
        *(result("klif-vgg16", "lif", [0.5], time_steps=steps) for steps in (16, 4, 2)),
    )
    write_page(tmp_path)
    titles = re.findall("^## klif-vgg16: (.*)", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert titles == ["T 2", "T 4", "T 4, tuned learning rate", "T 16"]


def test_a_page_without_comparable_runs_claims_nothing(tmp_path: Path) -> None:
    write(tmp_path, result("klif-vgg16", "lif", [0.5]))
    write_page(tmp_path)
    assert "What the papers claim" not in (tmp_path / "README.md").read_text()


def test_the_page_of_initial_weights_is_what_its_results_give() -> None:
    spec = importlib.util.spec_from_file_location("initial_weights", DOCS / "initial_weights.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(json.loads(script.JSON.read_text()))
