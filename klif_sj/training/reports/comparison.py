"""Train the same network with one neuron after the other, by one recipe, and report what the swap brings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...models.neurons import canonical_name
from ...runtime.environment import environment
from ..atomic import write_atomically, write_json
from ..data.images import Split
from ..recipe import Recipe
from ..run import TrainingRun, cpu_threads
from ..step_cost import measure_step
from .pictures import PICTURES, draw_neurons

__all__ = ["Comparison", "Report", "markdown", "rows", "terminal_table"]

Report = dict[str, Any]
"""Plain values: recipe, network, test_inputs, neurons (the results by name), command, environment, pictures."""


class Comparison:
    """A comparison of neurons in the folder ``out``: one :class:`~klif_sj.training.run.TrainingRun` for each.

    All of them are by the same recipe, hence from the same initial weights, with the same order of the data and the
    same dropout, and in float32.

    :param recipe: how each neuron is trained
    :param neurons: keys of :data:`klif_sj.models.NEURONS`; one that is named twice, under whatever alias, is trained
        once
    :param out: folder of the report, its pictures and ``runs``; made where it is missing
    :param data_root: folder of the data sets
    :param accelerator: ``'auto'``, ``'cpu'``, ``'cuda'`` or ``'cuda:N'``
    :param resume: go on where an interrupted comparison in ``out`` stopped
    :param command: the command line, for the report

    Everything that a user can get wrong is refused here, before anything is trained or deleted:

    :raises ValueError: for no neuron or an unknown one, another precision, a resumption by another recipe, an ``out``
        that holds an unfinished comparison and no ``resume``; and as ``TrainingRun``
    :raises FileNotFoundError: for a data set that is not there and cannot be downloaded
    """

    def __init__(
        self,
        recipe: Recipe,
        neurons: Sequence[str],
        out: Path,
        *,
        data_root: Path,
        accelerator: str = "auto",
        resume: bool = False,
        command: str = "",
    ) -> None:
        if recipe.precision not in ("auto", "32-true"):
            raise ValueError(f"precision: a comparison is in 32-true, got {recipe.precision!r}")
        self.recipe, self.out, self.command = recipe.override(precision="32-true"), out, command
        names = list(dict.fromkeys(map(canonical_name, neurons)))
        if not names:
            raise ValueError("neurons: expected at least one name, got none")
        self._overwrite = self._check_folder(resume)
        splits: dict[str, Split] = {}
        self.runs = {
            name: TrainingRun(
                self.recipe.override(neuron=name),
                self._runs / f"{name}-seed{recipe.seed}",
                data_root=data_root,
                accelerator=accelerator,
                resume=True,
                overwrite=self._overwrite,
                command=command,
                splits=splits,
            )
            for name in names
        }

    @property
    def _runs(self) -> Path:
        return self.out / "runs"

    @property
    def _begun(self) -> Path:
        """By which recipe the runs in the folder are."""
        return self.out / "comparison.json"

    @property
    def _report(self) -> Path:
        return self.out / "report.json"

    def _check_folder(self, resume: bool) -> bool:
        """Whether the folder holds a finished comparison in whose place this one comes."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.out}")
        if not self._runs.exists():
            return False
        if not self._begun.exists():
            raise ValueError(f"out: {self._runs} is no comparison's; name another folder")
        if resume:
            differences = self.recipe.differences(Recipe.from_dict(json.loads(self._begun.read_text())))
            if differences:
                raise ValueError(f"resume: {self.out} was begun with other settings: {'; '.join(differences)}")
        elif not self._report.exists():
            raise ValueError(
                f"out: {self.out} holds an unfinished comparison. Add --resume to go on with it, "
                "name another folder, or delete this one"
            )
        return not resume

    def run(self, console: Console | None = None) -> Report:
        """Train, measure, and write ``report.json``, ``report.md`` and the pictures; returns the report.

        :raises KeyboardInterrupt: when interrupted, after Lightning has shut down
        """
        console = console or Console(quiet=True)
        if self._overwrite:
            shutil.rmtree(self._runs)
        self._report.unlink(missing_ok=True)
        write_json(self._begun, self.recipe.as_dict())
        results = {}
        for name, run in self.runs.items():
            console.print(f"[bold]{name}[/bold]")
            results[name] = run.run(console) | _step_cost(run)
        first = next(iter(results.values()))
        shared = ("recipe", "notation", "training_inputs", "test_inputs", "precision", "command", "environment")
        report: Report = {
            "recipe": self.recipe.as_dict(),
            "network": first["notation"],
            "test_inputs": first["test_inputs"],
            "neurons": {
                name: {key: value for key, value in result.items() if key not in shared}
                for name, result in results.items()
            },
            "command": self.command,
            "environment": environment(),
        }
        report["pictures"] = draw_neurons(report["neurons"], self.out)
        write_atomically(self.out / "report.md", markdown(report))
        write_json(self._report, report)
        return report


def _step_cost(run: TrainingRun) -> dict[str, float]:
    """Of a batch of the training set, whose batches are as large as is said; those of the test set share it out."""
    device = run.placement.device
    images, labels = (part.to(device) for part in next(iter(run.data.train_dataloader())))
    with cpu_threads(run.recipe.threads):
        cost = measure_step(run.module.to(device), images, labels)
    return {"step_seconds": cost.seconds, "step_peak_bytes": cost.peak_bytes}


def rows(report: Report) -> Iterator[tuple[str, list[str]]]:
    """The table of results: a label and one cell for each neuron."""
    results = list(report["neurons"].values())
    yield "test accuracy, %", [f"{100 * result['test_accuracy']:.2f}" for result in results]
    for quantity, title in (("firing_rate", "firing rate"), ("k", "k")):
        for layer in dict.fromkeys(layer for result in results for layer in result[quantity]):
            yield f"{title}, {layer}", [_number(result[quantity].get(layer)) for result in results]
    yield "time a step, ms", [f"{1e3 * result['step_seconds']:.2f}" for result in results]
    yield "peak memory, MiB", [f"{result['step_peak_bytes'] / 2**20:.1f}" for result in results]
    yield "backend", [result["backend"] for result in results]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def terminal_table(report: Report) -> Table:
    """The table of results for rich."""
    recipe = report["recipe"]
    title = f"{recipe['dataset']}, T = {recipe['time_steps']}, {recipe['epochs']} epochs, seed {recipe['seed']}"
    table = Table(title=title, caption=report["network"])
    table.add_column()
    for name in report["neurons"]:
        table.add_column(name, justify="right")
    for label, cells in rows(report):
        table.add_row(label, *cells)
    return table


def markdown(report: Report) -> str:
    """The report as Markdown, with its pictures beside it."""
    recipe, images = report["recipe"], report["test_inputs"]
    names = list(report["neurons"])
    table = [("", names), ("---", ["---:"] * len(names)), *rows(report)]
    lines = [
        f"# {' against '.join(names)} on {recipe['dataset']}",
        "",
        f"The same network, `{report['network']}`, with the same initial weights and the same order of the data for "
        f"every neuron; T = {recipe['time_steps']}, {recipe['epochs']} epochs, {recipe['width']:g} times the "
        f"paper's width, seed {recipe['seed']}.",
        "",
        *(f"| {' | '.join((label, *cells))} |" for label, cells in table),
        "",
        f"Accuracy is the last epoch's, on {images} test images that chose nothing: one image is {100 / images:.2f} "
        "points, and this is one seed. A firing rate is spikes per neuron and time step over the test set, after the "
        f"last epoch. A step is forward, loss and backward of {recipe['batch_size']} images; its peak memory is what "
        "it holds beyond weights and optimiser.",
        "",
        *(f"![{title}]({name})\n" for name, title in PICTURES.items() if name in report["pictures"]),
        "## How to repeat it",
        "",
        f"    {report['command']}",
        "",
        *(f"- {label}: {text}" for label, text in report["environment"].items()),
        "",
    ]
    return "\n".join(lines)
