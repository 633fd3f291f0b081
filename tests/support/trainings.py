"""Trainings small enough for tests: scikit-learn's digits, a tiny network, a few updates an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tolerance import assert_equal

from klif_sj.training.data.batches import load
from klif_sj.training.data.images import Split
from klif_sj.training.recipe import Recipe, load_recipe
from klif_sj.training.run import TrainingRun

TINY: dict[str, Any] = {"epochs": 3, "time_steps": 2, "width": 1 / 32, "batch_size": 240, "backend": "torch"}
UPDATES = 6
"""An epoch, of 1437 images."""


def tiny(**given: Any) -> Recipe:
    return load_recipe("digits").override(**{**TINY, **given})


def training(out: Path, recipe: Recipe | None = None, **given: Any) -> TrainingRun:
    return TrainingRun(recipe or tiny(), out, **{"data_root": Path("data"), "accelerator": "cpu", **given})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def finished_epochs(out: Path) -> int:
    return len(torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["History"]["epochs"])


def assert_same_training(out: Path, expected: Path) -> None:
    """The same numbers in every epoch, and the same weights to the last bit."""
    found, wanted = (json.loads((folder / "result.json").read_text()) for folder in (out, expected))
    assert found["history"] == wanted["history"]
    found, wanted = weights(out), weights(expected)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert_equal(found[name], value, name)


def load_both(name: str, root: Path, time_steps: int | None = None) -> tuple[Split, Split]:
    """The training and the test set."""
    return load(name, root, "train", time_steps), load(name, root, "test", time_steps)
