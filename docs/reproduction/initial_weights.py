"""Measure what the initial weights of the KLIF networks' fully connected layers do for LIF and for KLIF.

    python docs/reproduction/initial_weights.py --recipe digits --seeds 0,1,2,3,4
    python docs/reproduction/initial_weights.py --recipe klif-fashion-mnist --width 0.125 --epochs 1 --data-root data

Every neuron is trained with He's normal distribution, our choice, and with torch's own weights, and evaluated on
training samples that were put aside. The page initial-weights.md is written from initial-weights.json, which has one
entry for each recipe.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from klif_sj.models import blocks
from klif_sj.training.recipe import load_recipe
from klif_sj.training.reports.summary import markdown_table, mean_and_deviation, paired_difference
from klif_sj.training.run import TrainingRun

HERE = Path(__file__).parent
JSON, PAGE = HERE / "initial-weights.json", HERE / "initial-weights.md"
NEURONS = ("lif", "klif")
HE, TORCH = "He's normal", "torch's own"

INTRODUCTION = """\
# The initial weights of fully connected layers

The KLIF paper does not say from which weights its networks start. No normalisation precedes the neurons of their fully
connected layers, so ours start from He's normal distribution (see [the networks](../networks.md)). A choice of ours
must not favour one neuron. Here LIF and KLIF are trained with it and with torch's own initial weights, and evaluated on
training samples that were put aside; the test set is not read. *He's less torch's* is the mean over the seeds with its
95 % interval by Student's paired t, and *favours KLIF by* is KLIF's such difference less LIF's. This page is written by
`python docs/reproduction/initial_weights.py` from `initial-weights.json`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits", help="one whose network has fully connected spiking layers")
    parser.add_argument("--seeds", default="0,1,2", help="one run of each neuron and initialisation for each")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--width", type=float)
    parser.add_argument("--time-steps", type=int, default=4)
    parser.add_argument("--validation", type=float, default=0.2, help="fraction of the training set (default: 0.2)")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("initial-weights"), help="folder of the runs' checkpoints")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("epochs", "width", "time_steps", "validation")}
    recipe = load_recipe(options.recipe).override(threads=1, **{k: v for k, v in given.items() if v is not None})
    accuracies: dict[str, dict[str, dict[int, float]]] = {}
    for seed in map(int, options.seeds.split(",")):
        for neuron in NEURONS:
            for weights in (HE, TORCH):
                run = recipe.override(neuron=neuron, seed=seed)
                folder = options.runs / "-".join([recipe.name, neuron, weights.split("'")[0], f"seed{seed}"])
                keep_torchs = mock.patch.object(blocks, "spiking_from_the_start")
                with nullcontext() if weights == HE else keep_torchs:
                    result = TrainingRun(run, folder, data_root=options.data_root, resume=True).run(Console())
                of_neuron = accuracies.setdefault(neuron, {}).setdefault(weights, {})
                of_neuron[seed] = 100 * result["validation_accuracy"]
    entries = json.loads(JSON.read_text()) if JSON.exists() else {}
    entries[recipe.name] = {"recipe": recipe.as_dict(), "accuracies": accuracies}
    JSON.write_text(json.dumps(entries, indent=1) + "\n")
    PAGE.write_text(page(json.loads(JSON.read_text())))


def page(entries: dict[str, Any]) -> str:
    """The page, of the entries by recipe."""
    parts = [INTRODUCTION]
    for name, entry in entries.items():
        recipe, gains, lines = entry["recipe"], {}, []
        for neuron, by_weights in entry["accuracies"].items():
            he, own = by_weights[HE], by_weights[TORCH]
            gains[neuron] = {seed: he[seed] - own[seed] for seed in he}
            figures = [mean_and_deviation([*of_seed.values()]) for of_seed in (he, own)]
            lines.append([neuron, *figures, str(paired_difference(he, own)), str(len(he))])
        parts.append(
            f"## {name}\n\nThe network {recipe['network']} at width {recipe['width']:g}, T = {recipe['time_steps']}, "
            f"{recipe['epochs']} epochs, learning rate {recipe['learning_rate']:g}, {recipe['validation']:g} of the "
            "training set put aside.\n"
        )
        head = ["neuron", f"{HE}: validation accuracy, %", TORCH, "He's less torch's, points", "seeds"]
        parts.append(markdown_table(head, lines))
        parts.append(f"Favours KLIF by {paired_difference(gains['klif'], gains['lif'])} points.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
