"""Run rows of the KLIF paper's tables, and put the results beside the published figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from ..atomic import write_json
from ..divergence import DivergenceError
from ..recipe import Recipe, check_seeds
from ..run import TrainingRun
from .paper_tables import Figure, run_name, size_name
from .reproduction_page import RESULTS, TUNING, check_page, write_page
from .tuning import Tuned

__all__ = ["plan", "reproduce"]

TABLES_OWN = {*Recipe.UNTRAINED, "network", "dataset", "neuron", "coding", "seed", "validation"}
"""Fields of a recipe that cannot be given: they identify the figure and the run, and figures are of the test set."""

UNFINISHED = "runs"
"""Folder of the runs' checkpoints. They are needed to continue a run, and not for the page."""


def plan(
    figures: Iterable[Figure], seeds: Sequence[int], tuned: Tuned | None = None, **given: Any
) -> dict[str, Recipe]:
    """The runs that figures need, by name, one seed after the other. A run that several figures need comes once.

    :param figures: what is to be reproduced
    :param seeds: one run for each
    :param tuned: values that were chosen for each neuron
    :param given: values of :class:`~klif_sj.training.recipe.Recipe` in place of the paper's
    :raises ValueError: for a value that the recipe refuses, or that the table chooses; for no seed or a repeated one;
        for tuned values that belong to another recipe, lack a neuron, or are given as well
    """
    check_seeds(seeds)
    for name in sorted(TABLES_OWN & given.keys()):
        raise ValueError(f"{name}: the table chooses it; name its neurons, data sets, networks and the seeds")
    recipes = [figure.as_published().override(**given) for figure in figures]
    if tuned is not None:
        recipes = [tuned.applied_to(recipe) for recipe in recipes]
        for field in sorted(given.keys() & {field for recipe in recipes for field in recipe.tuned}):
            raise ValueError(f"{field}: expected it either given or from {tuned.file}, got both")
    runs = [recipe.override(seed=seed) for seed in seeds for recipe in recipes]
    return {run_name(recipe): recipe for recipe in runs}


def reproduce(runs: dict[str, Recipe], out: Path, console: Console, tuned: Tuned | None = None, **how: Any) -> None:
    """Train the runs that have no result in ``out`` yet, and write the page after each run.

    ``out/results`` gets a JSON file for each finished run, ``out/README.md`` and ``out/pictures`` the page,
    ``out/runs`` the checkpoints, from which the next call goes on with an unfinished run, ``out/tuning`` how values
    were chosen for each neuron.

    :param runs: what to run, by name
    :param out: folder of these runs, and of earlier ones
    :param console: shows progress
    :param tuned: the values that were chosen for each neuron, where any were
    :param how: ``data_root``, ``devices``, ``accelerator`` and ``command`` of
        :class:`~klif_sj.training.run.TrainingRun`
    :raises ValueError: before anything is run, if ``out`` has a result of the same name from another recipe, or a page
        that is no reproduction's
    :raises FileNotFoundError: after all other runs, for those whose data set is not there
    :raises klif_sj.training.divergence.DivergenceError: after all other runs, for those that diverged
    """
    check_page(out)
    unfinished = {name: recipe for name, recipe in runs.items() if not _is_finished(out, name, recipe)}
    if tuned is not None:
        for size in {size_name(recipe) for recipe in runs.values()}:
            _write_tuning(out, size, tuned)
    missing, diverged = {}, []
    for name, recipe in unfinished.items():
        console.print(f"[bold]{name}[/bold]")
        try:
            run = TrainingRun(recipe, out / UNFINISHED / name, resume=True, **how)
        except FileNotFoundError as error:
            missing[recipe.dataset] = str(error)
            continue
        try:
            result = run.run(console)
        except DivergenceError as error:
            diverged.append(f"{name}: {error}")
            continue
        _write(out, name, result)
    _write(out)
    if missing:
        raise FileNotFoundError("\n".join([*missing.values(), *diverged]))
    if diverged:
        raise DivergenceError("\n".join(diverged))


@rank_zero_only
def _write(out: Path, name: str = "", result: dict[str, Any] | None = None) -> None:
    """Write a run's result, if there is one, and then the page. Only the first of several processes does so."""
    if result is not None:
        write_json(_result_file(out, name), result, indent=1)
    write_page(out)


@rank_zero_only
def _write_tuning(out: Path, size: str, tuned: Tuned) -> None:
    write_json(out / TUNING / f"{size}.json", tuned.found, indent=1)


def _result_file(out: Path, name: str) -> Path:
    return out / RESULTS / f"{name}.json"


def _is_finished(out: Path, name: str, recipe: Recipe) -> bool:
    file = _result_file(out, name)
    if not file.exists():
        return False
    differences = recipe.differences(Recipe.from_dict(json.loads(file.read_text())["recipe"]))
    if differences:
        raise ValueError(
            f"out: {file} is of another recipe ({'; '.join(differences)}). Name another folder, or delete the file"
        )
    return True
