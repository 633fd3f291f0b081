"""Train the same network with several neurons and seeds, by one recipe, and report what the swap brings."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..._environment import environment
from ...models.neurons import canonical_name
from ..atomic import write_atomically, write_json
from ..data.images import Split
from ..recipe import Recipe, check_seeds
from ..run import TrainingRun, cpu_threads
from ..step_cost import measure_step
from .pictures import PICTURES, draw_neurons
from .summary import Difference, conclusion, markdown_table, mean_and_deviation, paired_difference

__all__ = ["Comparison", "Report", "conclusion_of", "markdown", "results_table"]

Report = dict[str, Any]
"""Plain values: recipe, seeds, network, test_inputs, neurons (the results by name), command, environment, pictures."""


class Comparison:
    """A comparison of neurons in ``out``: a :class:`~klif_sj.training.run.TrainingRun` for each neuron and each seed.

    All runs follow one recipe, in float32. Runs with the same seed start from the same initial weights and get the same
    order of the data and the same dropout, so that their accuracies can be compared in pairs.

    :param recipe: how each neuron is trained
    :param neurons: keys of :data:`klif_sj.models.NEURONS`; one that is named twice, under whatever alias, is trained
        once
    :param seeds: each trains all neurons once
    :param out: folder of the report, its pictures and ``runs``; it is created if it is missing
    :param data_root: folder of the data sets
    :param accelerator: ``'auto'``, ``'cpu'``, ``'cuda'`` or ``'cuda:N'``
    :param resume: continue an interrupted comparison in ``out``
    :param command: the command line, for the report

    The constructor refuses all mistakes that a user can make, before anything is trained or deleted:

    :raises ValueError: for no neuron or an unknown one, seeds that repeat, another precision, validation samples, a
        resumption by another recipe, or, without ``resume``, an ``out`` that holds an unfinished comparison; and as
        ``TrainingRun``
    :raises FileNotFoundError: for a data set that is not there and cannot be downloaded
    """

    def __init__(
        self,
        recipe: Recipe,
        neurons: Sequence[str],
        seeds: Sequence[int],
        out: Path,
        *,
        data_root: Path,
        accelerator: str = "auto",
        resume: bool = False,
        command: str = "",
    ) -> None:
        if recipe.precision not in ("auto", "32-true"):
            raise ValueError(f"precision: a comparison is in 32-true, got {recipe.precision!r}")
        if recipe.validation:
            raise ValueError(f"validation: a comparison reports test accuracies, got {recipe.validation}")
        check_seeds(seeds)
        self.recipe, self.out, self.command = recipe.override(precision="32-true"), out, command
        names = list(dict.fromkeys(map(canonical_name, neurons)))
        if not names:
            raise ValueError("neurons: expected at least one name, got none")
        self._overwrite = self._check_folder(resume)
        splits: dict[str, Split] = {}
        self.runs = {
            (name, seed): TrainingRun(
                self.recipe.override(neuron=name, seed=seed),
                self._runs / f"{name}-seed{seed}",
                data_root=data_root,
                accelerator=accelerator,
                resume=True,
                overwrite=self._overwrite,
                command=command,
                splits=splits,
            )
            for seed in seeds
            for name in names
        }

    @property
    def _runs(self) -> Path:
        return self.out / "runs"

    @property
    def _begun(self) -> Path:
        """The file with the recipe of the runs in the folder."""
        return self.out / "comparison.json"

    @property
    def _report(self) -> Path:
        return self.out / "report.json"

    def _check_folder(self, resume: bool) -> bool:
        """Whether the folder holds a finished comparison, which this one replaces."""
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
        for (name, seed), run in self.runs.items():
            console.print(f"[bold]{name}, seed {seed}[/bold]")
            results[name, seed] = run.run(console)
        first = next(iter(results.values()))
        neurons = dict.fromkeys(name for name, _ in results)
        report: Report = {
            "recipe": self.recipe.as_dict(),
            "seeds": list(dict.fromkeys(seed for _, seed in results)),
            "network": first["notation"],
            "test_inputs": first["test_inputs"],
            "neurons": {name: self._summary(name, results) for name in neurons},
            "command": self.command,
            "environment": environment(),
        }
        report["conclusion"] = conclusion_of(report)
        report["pictures"] = draw_neurons(
            {name: results_of_neuron["runs"] for name, results_of_neuron in report["neurons"].items()}, self.out
        )
        write_atomically(self.out / "report.md", markdown(report))
        write_json(self._report, report)
        return report

    def _summary(self, name: str, results: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
        """The results of a neuron: its runs, their means, the difference from the first neuron, and the cost of a step.

        All accuracies but those of single runs are in per cent, their differences in points.
        """
        own = {seed: result for (neuron, seed), result in results.items() if neuron == name}
        first = next(neuron for neuron, _ in results)
        accuracies, baseline = (
            {seed: 100 * result["test_accuracy"] for (neuron, seed), result in results.items() if neuron == compared}
            for compared in (name, first)
        )
        difference = None if name == first else paired_difference(accuracies, baseline)
        first_result = next(iter(own.values()))
        return {
            "test_accuracy": statistics.fmean(accuracies.values()),
            "deviation": statistics.stdev(accuracies.values()) if len(own) > 1 else None,
            "difference": difference and asdict(difference),
            **{
                quantity: {
                    layer: statistics.fmean(result[quantity][layer] for result in own.values())
                    for layer in first_result[quantity]
                }
                for quantity in ("firing_rate", "k")
            },
            **_step_cost(self.runs[name, next(iter(own))]),
            "backend": first_result["backend"],
            "parameters": first_result["parameters"],
            "runs": [
                {"seed": seed, **{key: result[key] for key in ("test_accuracy", "seconds", "history")}}
                for seed, result in own.items()
            ],
        }


def _step_cost(run: TrainingRun) -> dict[str, float]:
    """The cost of a step with a batch of the training set, because a batch of the test set may be smaller."""
    device = run.placement.device
    images, labels = (part.to(device) for part in next(iter(run.data.train_dataloader())))
    with cpu_threads(run.recipe.threads):
        cost = measure_step(run.module.to(device), images, labels)
    return {"step_seconds": cost.seconds, "step_peak_bytes": cost.peak_bytes}


def results_table(report: Report) -> str:
    """The results in Markdown, a column for each neuron."""
    results = list(report["neurons"].values())
    differences = [_difference(result) for result in results]

    def rows() -> Iterator[tuple[str, list[str]]]:
        accuracies = [[100 * run["test_accuracy"] for run in result["runs"]] for result in results]
        yield "test accuracy, %", [mean_and_deviation(of_seeds) for of_seeds in accuracies]
        if len(report["seeds"]) > 1:
            yield "of each seed", [", ".join(f"{accuracy:.2f}" for accuracy in of_seeds) for of_seeds in accuracies]
        if any(differences):
            yield f"less {next(iter(report['neurons']))}'s, points", ["–" if d is None else str(d) for d in differences]
        for quantity, title in (("firing_rate", "firing rate"), ("k", "k")):
            for layer in dict.fromkeys(layer for result in results for layer in result[quantity]):
                values = [result[quantity].get(layer) for result in results]
                yield f"{title}, {layer}", ["–" if value is None else f"{value:.4f}" for value in values]
        yield "time a step, ms", [f"{1e3 * result['step_seconds']:.2f}" for result in results]
        yield "peak memory, MiB", [f"{result['step_peak_bytes'] / 2**20:.1f}" for result in results]
        yield "backend", [result["backend"] for result in results]

    return markdown_table(["", *report["neurons"]], ([label, *cells] for label, cells in rows()))


def _difference(result: dict[str, Any]) -> Difference | None:
    return None if result["difference"] is None else Difference(**result["difference"])


def conclusion_of(report: Report) -> str:
    """In one sentence, what the comparison supports and what it does not."""
    first, *others = report["neurons"]
    return conclusion(first, {name: _difference(report["neurons"][name]) for name in others})


def markdown(report: Report) -> str:
    """The report as Markdown, with its pictures beside it."""
    recipe, images = report["recipe"], report["test_inputs"]
    seeds = ", ".join(map(str, report["seeds"]))
    lines = [
        f"# {' against '.join(report['neurons'])} on {recipe['dataset']}",
        "",
        f"The same network, `{report['network']}`, for every neuron; for each seed, all start from the same initial "
        f"weights and meet the data in the same order. T = {recipe['time_steps']}, {recipe['epochs']} epochs, "
        f"{recipe['width']:g} times the paper's width, seeds {seeds}.",
        "",
        f"**{report['conclusion']}**",
        "",
        results_table(report),
        f"Accuracy is the last epoch's, on {images} test images that chose nothing: one image is {100 / images:.2f} "
        "points. With several seeds it is their mean ± the sample standard deviation; a difference is the mean over "
        "the seeds, with its 95 % interval by Student's paired t. A firing rate is spikes per neuron and time step "
        "over the test set, after the last epoch. A step is forward, loss and backward of "
        f"{recipe['batch_size']} images; its peak memory is what it holds beyond weights and optimiser.",
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
