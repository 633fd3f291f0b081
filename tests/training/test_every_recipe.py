"""Every recipe trains for a few steps, at a tiny width, on real digits that are dressed as its data set."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional
from torch import Tensor
from trainings import training

from klif_sj.models import spiking_layers
from klif_sj.training.data import batches as data
from klif_sj.training.data.catalogue import find_dataset
from klif_sj.training.data.images import Split
from klif_sj.training.recipe import load_recipe, recipe_names
from klif_sj.training.run import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING, TEST, BATCH = 12, 6, 4


@cache
def dressed(name: str, root: Path, split: str, time_steps: int) -> Split:
    """Digits at the data set's size: as colour images of bytes, or as the events of a digit that moves."""
    info, digits = find_dataset(name), load_digits()
    count = TRAINING + TEST
    images = torch.tensor(digits.images[:count], dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(info.image_size, info.image_size))
    inputs = (
        (images * 255).byte().expand(-1, info.in_channels, -1, -1)
        if info.kind == "image"
        else _events(images, time_steps)
    )
    labels = torch.tensor(digits.target[:count])
    rows = slice(0, TRAINING) if split == "train" else slice(TRAINING, count)
    return inputs[rows], labels[rows]


def _events(images: Tensor, time_steps: int) -> Tensor:
    """Counts ``[N, T, 2, H, W]`` of pixels that brighten and darken while the image moves to the right."""
    moved = torch.stack([images[:, 0].roll(step, -1) for step in range(time_steps + 1)], 1)
    change = moved.diff(dim=1)
    return torch.stack([(change > 0).float(), (change < 0).float()], 2)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = load_recipe(name)
    recipe = published.override(width=1 / 16, time_steps=4, epochs=1, batch_size=BATCH, backend="torch")
    monkeypatch.setattr(data, "load", dressed)
    running = training(tmp_path, recipe)
    before = {key: value.clone() for key, value in running.module.net.state_dict().items()}
    result = running.run()
    assert result["recipe"]["augmentations"] == list(published.augmentations)
    assert result["history"][0]["train_loss"] > 0
    _, net = load_checkpoint(running.checkpoint)
    after = net.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    weights = {key for key, _ in net.named_parameters() if ".neuron." not in key}
    assert moved >= weights, "every weight is trained"
    assert len(result["k"]) == (len(spiking_layers(net)) if published.neuron == "klif" else 0)
    assert all(k != 1 for k in result["k"].values()), "and every k"
    right = 0
    for x, labels in running.data.test_dataloader():
        with torch.no_grad():
            right += int((net.eval()(x).argmax(1) == labels).sum())
        functional.reset_net(net)
    assert result["test_accuracy"] == pytest.approx(right / TEST, abs=1e-6)
