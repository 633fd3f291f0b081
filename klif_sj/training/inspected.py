"""Inspect a checkpoint on the samples that its training evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..inspection import Inspection, Thresholds, inspect
from .classifier import LOSSES
from .run import Placement, data_of, load_checkpoint

__all__ = ["inspect_checkpoint"]


def inspect_checkpoint(
    path: str | Path,
    data_root: Path,
    *,
    inputs: int = 1000,
    batch_size: int | None = None,
    accelerator: str = "auto",
    title: str = "",
    thresholds: Thresholds | None = None,
    **options: Any,
) -> Inspection:
    """Inspect a network that ``klif-sj train`` has trained, in evaluation mode, with the loss of its recipe.

    It runs on the test set, or on the validation samples if the recipe puts some aside.

    :param path: the checkpoint
    :param data_root: folder of the data sets
    :param inputs: the number of inputs, from the first on, rounded up to whole batches
    :param batch_size: samples a batch; None takes the recipe's batch size
    :param accelerator: ``'auto'``, ``'cpu'``, ``'cuda'`` or ``'cuda:N'``
    :param title: the network's name in the report; empty means the recipe and its neuron
    :param thresholds: the limits beyond which a figure is a finding
    :param options: further options of :func:`klif_sj.inspect`

    :raises ValueError: for a file that is no such checkpoint, or less than one input; and as ``make_data``
    :raises FileNotFoundError: if there is no such file, or no data set
    """
    if inputs < 1:
        raise ValueError(f"inputs: expected at least 1, got {inputs}")
    recipe, net = load_checkpoint(path)
    device = Placement.find(accelerator).device
    data = data_of(recipe, data_root, batch_size)

    def batches() -> Iterator[Any]:
        left = inputs
        for batch in data.val_dataloader():
            yield batch
            left -= len(batch[1])
            if left <= 0:
                return

    def forward(net: Any, x: Any) -> Any:
        return net.outputs_by_step(x)

    return inspect(
        net.to(device).eval(),
        batches(),
        LOSSES[recipe.loss],
        forward=forward,
        title=title or f"{recipe.name}, {recipe.neuron}",
        thresholds=thresholds,
        **options,
    )
