"""One training by a recipe: its folder, its checkpoints, its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from ..models import SpikingNetwork, build_network, neuron_factory
from ..runtime.environment import environment
from .checkpoint import RecipeInCheckpoint, read_checkpoint, recipe_in
from .data import make_data
from .data.info import find_dataset
from .divergence import StopOnDivergence
from .files import write_atomically
from .loop import Placement, check_backend, cpu_threads, fit, is_first_process, make_trainer
from .measure import backends_serving
from .module import History, SpikingClassifier
from .recipe import Recipe
from .report import by_layer

__all__ = ["TrainingRun", "load_checkpoint", "network_of"]


def network_of(recipe: Recipe) -> SpikingNetwork:
    """The recipe's network, with the initial weights that its seed gives.

    :raises ValueError: for an unknown network or data set, or an option that the network does not take
    """
    dataset = find_dataset(recipe.dataset)
    torch.manual_seed(recipe.seed)
    return build_network(
        recipe.network,
        neuron_factory(recipe.neuron, recipe.time_steps, recipe.backend),
        recipe.time_steps,
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        classes=dataset.classes,
        width=recipe.width,
        coding=recipe.coding,
        dropout=recipe.dropout,
    )


def load_checkpoint(path: str | Path) -> tuple[Recipe, SpikingNetwork]:
    """The recipe of a checkpoint that ``klif-sj train`` wrote, and its network with the trained weights, on the CPU.

    The network's neurons run by ``backend="auto"``: that of the training may be one that is not here.

    :raises FileNotFoundError: where there is none
    :raises ValueError: for a file that is damaged, no such checkpoint, or whose weights are not its recipe's network's
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    recipe = recipe_in(checkpoint, path)
    net = network_of(recipe.override(backend="auto"))
    weights = {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the network {recipe.network} with the neuron {recipe.neuron}, as its recipe says: "
            f"{error}"
        ) from error
    return recipe, net


class TrainingRun:
    """A training in the folder ``out``, which holds a checkpoint after every epoch, its logs and its result.

    :param recipe: what to train
    :param out: folder of ``checkpoints/last.ckpt``, ``logs`` (CSV and TensorBoard) and ``result.json``; made where it
        is missing
    :param data_root: folder of the data sets
    :param devices: processes with a device each; None is one, or as many as torchrun has started
    :param accelerator: ``'auto'``, ``'cpu'`` or ``'cuda'``
    :param resume: go on where the training in ``out`` was interrupted; one that has not begun begins
    :param command: the command line, for the result

    Everything that a user can get wrong is refused here, before anything is trained or deleted:

    :raises ValueError: for an unknown name, a device or backend that is not here, a batch that is larger than the
        training set or does not divide over the devices, a broken data file or checkpoint, an ``out`` that holds
        another training
    :raises FileNotFoundError: for a data set that is not there and cannot be downloaded
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        data_root: Path,
        devices: int | None = None,
        accelerator: str = "auto",
        resume: bool = False,
        command: str = "",
    ) -> None:
        self.recipe = recipe
        self.out = Path(out)
        self.command = command
        self.placement = Placement.find(accelerator, devices)
        self.precision = self._precision()
        check_backend(recipe.backend, self.placement.accelerator)
        self._resumed = self._check_folder(resume)
        self.data = make_data(
            recipe.dataset,
            Path(data_root),
            self._batch_size(),
            recipe.seed,
            time_steps=recipe.time_steps,
            augmentations=recipe.augmentations,
        )
        self.module = SpikingClassifier(
            network_of(recipe),
            recipe.learning_rate,
            recipe.annealing_epochs or recipe.epochs,
            recipe.seed,
            optimizer=recipe.optimizer,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            loss=recipe.loss,
            channels_last=recipe.channels_last,
        )

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.out / "checkpoints" / "last.ckpt"

    @property
    def result(self) -> Path:
        """What :meth:`run` returned, as JSON."""
        return self.out / "result.json"

    def _precision(self) -> str:
        on_gpu = self.placement.accelerator == "cuda"
        if self.recipe.precision == "auto":
            return "16-mixed" if on_gpu else "32-true"
        if self.recipe.precision == "16-mixed" and not on_gpu:
            raise ValueError("precision: 16-mixed needs a GPU; on the CPU there are 32-true, bf16-mixed and 64-true")
        return self.recipe.precision

    def _batch_size(self) -> int:
        """Of each process."""
        size, processes = self.recipe.batch_size, self.placement.processes
        if size % processes:
            raise ValueError(f"batch_size: expected a multiple of the {processes} processes, got {size}")
        return size // processes

    def _check_folder(self, resume: bool) -> bool:
        """Whether there is a checkpoint to go on from. Only the first process looks, as it alone writes."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.out}")
        if not self.checkpoint.exists():
            return False
        if resume:
            differences = self.recipe.differences(recipe_in(read_checkpoint(self.checkpoint), self.checkpoint))
            if differences:
                raise ValueError(f"resume: {self.checkpoint} is of another training: {'; '.join(differences)}")
            return True
        if is_first_process():
            state = "a finished" if self.result.exists() else "an unfinished"
            raise ValueError(
                f"out: {self.out} holds {state} training. Add --resume to go on with it, name another folder, "
                "or delete this one"
            )
        return False

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Train to the last epoch and write ``result.json``; returns what it holds.

        :raises KeyboardInterrupt: when interrupted, after Lightning has shut down
        :raises klif_sj.training.divergence.DivergenceError: where the loss is NaN or infinite
        :raises OSError: where a checkpoint cannot be saved; the one before it stays
        """
        console = console or Console(quiet=True)
        history, timer = History(), Timer()
        logs = self.out / "logs"
        trainer = make_trainer(
            self.placement,
            epochs=self.recipe.epochs,
            checkpoint=self.checkpoint,
            callbacks=[
                history,
                timer,
                StopOnDivergence(),
                RecipeInCheckpoint(self.recipe),
                LearningRateMonitor(logging_interval="epoch"),
            ],
            progress=not console.quiet,
            precision=self.precision,
            benchmark=self.placement.accelerator == "cuda",
            gradient_clip_val=self.recipe.gradient_clip,
            # A resumed run writes into the next folder of CSV files; TensorBoard joins the files of one folder.
            logger=[CSVLogger(logs, name="csv"), TensorBoardLogger(logs, name="tensorboard", version="")],
            default_root_dir=self.out,
        )
        with cpu_threads(self.recipe.threads):
            fit(trainer, self.module, self.data, self.checkpoint if self._resumed else None)
        result = self._result(history.epochs, timer.time_elapsed("train"))
        if trainer.is_global_zero:
            write_atomically(self.result, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return result

    def _result(self, history: list[dict[str, float]], seconds: float) -> dict[str, Any]:
        last, net = history[-1], self.module.net
        return {
            "recipe": self.recipe.as_dict(),
            "notation": net.notation,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "training_inputs": len(self.data.train),
            "test_inputs": len(self.data.test),
            "test_accuracy": last["test_accuracy"],
            "firing_rate": by_layer(last, "firing_rate"),
            "k": by_layer(last, "k"),
            "history": history,
            "seconds": seconds,
            "precision": self.precision,
            "processes": self.placement.processes,
            "backend": backends_serving(net, torch.empty(0, device=self.placement.accelerator)),
            "command": self.command,
            "environment": environment(),
        }
