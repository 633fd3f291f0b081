"""The page of a reproduction: the paper's figures beside ours, and the pictures, all from the results' files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models import NEURONS
from ..atomic import write_atomically
from ..recipe import Recipe
from .claims import claims, claims_table, verdicts
from .paper_tables import TABLES, TUNED, Table, as_text, changes, size_name, size_title, title_of
from .pictures import PICTURES, draw_neurons
from .summary import conclusion, markdown_table, mean_and_deviation, paired_difference
from .tuning import Tuned

__all__ = ["RESULTS", "Result", "check_page", "page", "read_results", "write_page"]

RESULTS = "results"
TUNING = "tuning"
PAGE = "README.md"
PICTURE_FOLDER = "pictures"

INTRODUCTION = """\
# The KLIF paper's results, and ours

Generated from the files in `results/`, one for each training that was really run, by `klif-sj reproduce` or, from those
files alone, `python docs/reproduction/page.py`.

- **Paper** is the test accuracy, in per cent, that [arXiv 2302.09238](https://arxiv.org/abs/2302.09238) prints.
- **Ours** is that of the last epoch, the mean over the seeds and, from two on, ± the sample standard deviation. The
  test set chooses nothing. What has not been run is empty.
- A **difference** is the mean over the seeds of a neuron's accuracy less that of the first one, in points, with its
  95 % interval by Student's paired t.
- **Run as** says in what a run differs from the recipe of the paper's figure. What was trained *shorter* or is
  *smaller* is not to be held against the paper; its neurons compare with each other, as they share recipe, initial
  weights and order of the data. *Tuned* is what was chosen for each neuron on training samples that were put aside.
  What the paper leaves open and we chose is at the head of each recipe, in `klif_sj/training/recipes`.
"""

CLAIMS = """\
## What the papers claim

The table has each claim that our runs say something about, with the paper's own figure. In these runs a claim *holds*
if the whole 95 % interval over the seeds is on its side, and *does not hold* if it is on the other. Three or more
seeds that all give the same figure, so that there is no interval, decide as well. Otherwise the runs *cannot say*:
they are too few, or the difference is too small. Where there is no difference, one claim in twenty is still decided, by
chance. A claim that two neurons are equal holds if their figures are equal with each of three or more seeds, and one
seed with another figure refutes it. The KLIF paper says of KLIF* that its accuracy "does not change a lot"; we read
this as less than one point. Runs that are shorter or smaller than the paper's neither prove nor refute its figure. The
section of the runs has their command.
"""


@dataclass(frozen=True)
class Result:
    """One finished run: the recipe that it was run by, and what ``TrainingRun`` wrote about it."""

    name: str
    recipe: Recipe
    found: dict[str, Any]

    @property
    def size(self) -> str:
        """The name that the run shares with runs of other neurons and seeds that are otherwise alike."""
        return size_name(self.recipe)

    @property
    def title(self) -> str:
        """What :attr:`size` says, for a reader."""
        return size_title(self.recipe)

    @property
    def run_as(self) -> str:
        """A text that says how the run differs from the paper's."""
        changed = changes(self.recipe)
        if not changed:
            return "as published"
        kinds = {_kind(name, value, paper) for name, (value, paper) in changed.items()}
        differences = (
            f"{title_of(name)} {as_text(value)} instead of {as_text(paper)}" for name, (value, paper) in changed.items()
        )
        return f"**{', '.join(sorted(kinds))}**: {', '.join(differences)}"


def _kind(name: str, value: Any, paper: Any) -> str:
    """What a run is called in which a field has this value in place of the paper's: different, shorter or smaller."""
    if value == TUNED or name not in ("epochs", "time_steps", "width") or value > paper:
        return "different"
    return "shorter" if name == "epochs" else "smaller"


def read_results(out: Path) -> list[Result]:
    """The results in ``out/results``, sorted by size, by neuron in the usual order, and by seed.

    Fewer time steps come before more, and the recipe's own values before tuned ones.

    :raises ValueError: for a file that holds no result, naming it
    """
    results = []
    for file in (out / RESULTS).glob("*.json"):
        try:
            content = json.loads(file.read_text())
            results.append(Result(file.stem, Recipe.from_dict(content["recipe"]), content))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: expected the result of a run, got something else ({error!r})") from error
    neurons = list(NEURONS)

    def order(result: Result) -> tuple[Any, ...]:
        recipe = result.recipe
        size = (recipe.name, recipe.time_steps, bool(recipe.tuned), result.size)
        return *size, neurons.index(recipe.neuron), recipe.seed

    return sorted(results, key=order)


def write_page(out: Path) -> None:
    """Write ``out/README.md`` and draw ``out/pictures`` from ``out/results``.

    The file ``out/results/SIZE.md`` may hold a text about the runs of one size, and ``out/tuning/SIZE.json`` says how
    values were chosen for each neuron.

    :raises ValueError: for a result that cannot be read, or a README.md that is another's
    """
    check_page(out)
    results = read_results(out)
    pictures = out / PICTURE_FOLDER
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = {
        size: draw_neurons(_runs(group), pictures, prefix=f"{size}-", suffix=".svg")
        for size, group in _by_size(results).items()
    }
    notes = {file.stem: file.read_text().strip() for file in (out / RESULTS).glob("*.md")}
    tuned = {file.stem: Tuned.read(file) for file in (out / TUNING).glob("*.json")}
    write_atomically(out / PAGE, page(results, drawn, notes, tuned))


def check_page(out: Path) -> None:
    """Check that writing the page would not overwrite something else.

    :raises ValueError: if it would
    """
    file, title = out / PAGE, INTRODUCTION.partition("\n")[0]
    if file.exists() and not file.read_text().startswith(title):
        raise ValueError(f"out: {file} is no page of a reproduction; name another folder")


def page(
    results: list[Result],
    pictures: dict[str, list[str]],
    notes: Mapping[str, str],
    tuned: Mapping[str, Tuned],
) -> str:
    """The page as Markdown.

    :param results: all that was run
    :param pictures: the files of the pictures for each of the results' sizes
    :param notes: texts about the runs of a size
    :param tuned: what was tuned for the neurons of a size
    """
    parts = [INTRODUCTION]
    if judged := claims(results):
        parts += [CLAIMS, f"{verdicts(judged)}\n", claims_table(judged)]
    for table in TABLES.values():
        parts += [f"## Table {table.number}: {table.title}\n", _table_of(table, results)]
    for size, group in _by_size(results).items():
        parts += _section(group, pictures[size], notes.get(size, ""), tuned.get(size))
    parts += _environments(results)
    return "\n".join(parts)


def _table_of(table: Table, results: list[Result]) -> str:
    lines = []
    for recipe in dict.fromkeys(figure.recipe for figure in table.figures):
        for figure in table.figures:
            if figure.recipe != recipe:
                continue
            published = figure.as_published()
            own = [r for r in results if (r.recipe.name, r.recipe.neuron) == (figure.recipe, figure.neuron)]
            head = [published.dataset, published.network, figure.row, f"{published.published_accuracy:g}"]
            for group in _by_size(own).values():
                accuracies = [100 * result.found["test_accuracy"] for result in group]
                lines.append([*head, mean_and_deviation(accuracies), str(len(group)), group[0].run_as])
            if not own:
                lines.append([*head, "", "", ""])
    return markdown_table(["data set", "network", "neuron", "paper", "ours", "seeds", "run as"], lines)


def _by_size(results: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.size, []).append(result)
    return groups


def _runs(group: list[Result]) -> dict[str, list[dict[str, Any]]]:
    """What the pictures show, by neuron."""
    return {
        neuron: [{"seed": result.recipe.seed, "history": result.found["history"]} for result in results]
        for neuron, results in _by_neuron(group).items()
    }


def _by_neuron(group: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in group:
        groups.setdefault(result.recipe.neuron, []).append(result)
    return groups


def _summary(group: list[Result]) -> Iterator[str]:
    """The neurons of one size: their means, their differences from the first one, and the conclusion."""
    accuracies = {
        neuron: {result.recipe.seed: 100 * result.found["test_accuracy"] for result in results}
        for neuron, results in _by_neuron(group).items()
    }
    first, *others = accuracies
    differences = {neuron: paired_difference(accuracies[neuron], accuracies[first]) for neuron in others}
    yield markdown_table(
        ["neuron", "test accuracy, %", "seeds", f"less {first}'s, points"],
        (
            [neuron, mean_and_deviation([*values.values()]), str(len(values)), str(differences.get(neuron) or "")]
            for neuron, values in accuracies.items()
        ),
    )
    yield f"{conclusion(first, differences)}\n"


def _section(group: list[Result], pictures: list[str], note: str, tuned: Tuned | None) -> Iterator[str]:
    first = group[0]
    yield f"## {first.title}\n"
    yield f"Run {first.run_as}. Network: `{first.found['notation']}`.\n"
    if note:
        yield f"{note}\n"
    if tuned is not None:
        epochs = tuned.found["recipe"]["epochs"]
        yield f"Chosen for each neuron after {epochs} epochs, on training samples put aside, before these runs:\n"
        yield tuned.table()
        yield f"    {tuned.found['command']}\n"
    yield from _summary(group)
    for kind, caption in PICTURES.items():
        for name in pictures:
            if name.endswith(f"-{Path(kind).stem}.svg"):
                yield f"![{caption}]({PICTURE_FOLDER}/{name})\n"
    yield markdown_table(
        ["neuron", "seed", "test accuracy, %", "parameters", "precision", "seconds", "result"],
        [
            [
                result.recipe.neuron,
                str(result.recipe.seed),
                f"{100 * result.found['test_accuracy']:.2f}",
                str(result.found["parameters"]),
                result.found["precision"],
                f"{result.found['seconds']:.0f}",
                f"[JSON]({RESULTS}/{result.name}.json)",
            ]
            for result in group
        ],
    )
    # Commands that differ in the order of their options are one command.
    for command in {frozenset(command.split()): command for command in (r.found["command"] for r in group)}.values():
        yield f"    {command}\n"


def _environments(results: list[Result]) -> Iterator[str]:
    runs: dict[str, list[str]] = {}
    for result in results:
        lines = "\n".join(f"- {label}: {text}" for label, text in result.found["environment"].items())
        runs.setdefault(lines, []).append(f"`{result.name}`")
    if runs:
        yield "## Environments\n"
    for lines, names in runs.items():
        yield f"{', '.join(names)}:\n\n{lines}\n"
