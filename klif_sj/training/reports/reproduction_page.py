"""The page of a reproduction: the paper's figures beside ours, and the pictures, all from the results' files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...models import NEURONS
from ..atomic import write_atomically
from ..classifier import by_layer
from ..recipe import Recipe
from .paper_tables import TABLES, Table, as_text, changes, size_name, title_of
from .pictures import PICTURES, draw_neurons

__all__ = ["RESULTS", "Result", "check_page", "page", "read_results", "write_page"]

RESULTS = "results"
PAGE = "README.md"
PICTURE_FOLDER = "pictures"

INTRODUCTION = """\
# The KLIF paper's results, and ours

Generated from the files in `results/`, one for each training that was really run, by `klif-sj reproduce` or, from those
files alone, `python docs/reproduction/page.py`.

- **Paper** is the test accuracy, in per cent, that [arXiv 2302.09238](https://arxiv.org/abs/2302.09238) prints.
- **Ours** is that of the last epoch, the mean over the seeds and, from two on, ± the sample standard deviation. The
  test set chooses nothing. What has not been run is empty.
- **Run as** says in what a run differs from the recipe of the paper's figure. What was trained *shorter* or is
  *smaller* is not to be held against the paper; its neurons compare with each other, as they share recipe, initial
  weights and order of the data. What the paper leaves open and we chose is at the head of each recipe, in
  `klif_sj/training/recipes`.
"""


@dataclass(frozen=True)
class Result:
    """One finished run: the recipe that it was run by, and what ``TrainingRun`` wrote about it."""

    name: str
    recipe: Recipe
    found: dict[str, Any]

    @property
    def size(self) -> str:
        """What the run shares with those of other neurons and seeds that were run alike."""
        return size_name(self.recipe)

    @property
    def run_as(self) -> str:
        """In what the run differs from the paper's."""
        found = changes(self.recipe)
        if not found:
            return "as published"
        kinds = {
            "shorter" if name == "epochs" and value < paper else
            "smaller" if name in ("width", "time_steps") and value < paper else
            "different"
            for name, (value, paper) in found.items()
        }  # fmt: skip
        differences = (
            f"{title_of(name)} {as_text(value)} instead of {as_text(paper)}" for name, (value, paper) in found.items()
        )
        return f"**{', '.join(sorted(kinds))}**: {', '.join(differences)}"


def read_results(out: Path) -> list[Result]:
    """The results in ``out/results``, by recipe, the neurons in their usual order, and seed.

    :raises ValueError: for a file that holds none, naming it
    """
    results = []
    for file in (out / RESULTS).glob("*.json"):
        try:
            found = json.loads(file.read_text())
            results.append(Result(file.stem, Recipe.from_dict(found["recipe"]), found))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: expected the result of a run, got something else ({error!r})") from error
    neurons = list(NEURONS)
    return sorted(results, key=lambda result: (result.size, neurons.index(result.recipe.neuron), result.recipe.seed))


def write_page(out: Path) -> None:
    """Write ``out/README.md`` and draw ``out/pictures`` from ``out/results``.

    What there is to say of the runs of one size beside their numbers is taken from ``out/results/SIZE.md``.

    :raises ValueError: for a result that cannot be read, or a README.md that is another's
    """
    check_page(out)
    results = read_results(out)
    pictures = out / PICTURE_FOLDER
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = {
        size: draw_neurons(_by_neuron(group), pictures, prefix=f"{size}-", suffix=".svg")
        for size, group in _by_size(results).items()
    }
    notes = {file.stem: file.read_text().strip() for file in (out / RESULTS).glob("*.md")}
    write_atomically(out / PAGE, page(results, drawn, notes))


def check_page(out: Path) -> None:
    """:raises ValueError: where writing the page would overwrite something else"""
    file, title = out / PAGE, INTRODUCTION.partition("\n")[0]
    if file.exists() and not file.read_text().startswith(title):
        raise ValueError(f"out: {file} is no page of a reproduction; name another folder")


def page(results: list[Result], pictures: dict[str, list[str]], notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page as Markdown.

    :param results: all that was run
    :param pictures: the files of the pictures for each of the results' sizes
    :param notes: what else there is to say of a size
    """
    parts = [INTRODUCTION]
    for table in TABLES.values():
        parts += [f"## Table {table.number}: {table.title}\n", _table_of(table, results)]
    for size, group in _by_size(results).items():
        parts += _section(group, pictures[size], notes.get(size, ""))
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
                lines.append([*head, _mean_and_spread(accuracies), str(len(group)), group[0].run_as])
            if not own:
                lines.append([*head, "", "", ""])
    return _markdown_table(["data set", "network", "neuron", "paper", "ours", "seeds", "run as"], lines)


def _by_size(results: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.size, []).append(result)
    return groups


def _by_neuron(group: list[Result]) -> dict[str, dict[str, Any]]:
    """For each neuron, the mean over its seeds of what the pictures show."""
    neurons = {}
    for neuron in dict.fromkeys(result.recipe.neuron for result in group):
        histories = [result.found["history"] for result in group if result.recipe.neuron == neuron]
        history = [
            {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
            for rows in zip(*histories, strict=True)
        ]
        last = history[-1]
        neurons[neuron] = {"history": history, "k": by_layer(last, "k"), "firing_rate": by_layer(last, "firing_rate")}
    return neurons


def _section(group: list[Result], pictures: list[str], note: str) -> Iterator[str]:
    first = group[0]
    yield f"## {first.size}\n"
    yield f"Run {first.run_as}. Network: `{first.found['notation']}`. Curves and bars are means over the seeds.\n"
    if note:
        yield f"{note}\n"
    for kind, caption in PICTURES.items():
        for name in pictures:
            if name.endswith(f"-{Path(kind).stem}.svg"):
                yield f"![{caption}]({PICTURE_FOLDER}/{name})\n"
    yield _markdown_table(
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
    for command in dict.fromkeys(result.found["command"] for result in group):
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


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _markdown_table(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))
