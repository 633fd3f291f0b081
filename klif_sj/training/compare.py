"""Train the same network with one neuron after the other, and report what the swap brings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..models import CodedConvNet, mnist_network, neuron_factory
from ..runtime.environment import environment
from . import report as reports
from .checkpoint import read_checkpoint
from .data import make_data
from .data.info import find_dataset
from .files import write_atomically
from .loop import Placement, check_backend, cpu_threads, fit, make_trainer
from .measure import backends_serving, measure_step
from .module import History, SpikingClassifier
from .plots import draw
from .settings import Settings

__all__ = ["Comparison"]


class Comparison:
    """A comparison of neurons in the folder ``out``, which holds a checkpoint after every epoch.

    Every neuron starts from the same seed, hence the same initial weights, order of the data and dropout.

    :param settings: what to compare
    :param out: folder of checkpoints, pictures and report; made where it is missing
    :param resume: go on where an interrupted comparison in ``out`` stopped
    :param command: the command line, for the report

    Everything that a user can get wrong is refused here, before anything is trained or deleted:

    :raises ValueError: for an unknown name, a device or backend that is not here, a broken data file or checkpoint, a
        resumption with other settings, an ``out`` that holds an unfinished comparison and no ``resume``
    :raises FileNotFoundError: for a data set that is not there and cannot be downloaded
    """

    def __init__(self, settings: Settings, out: Path, *, resume: bool = False, command: str = "") -> None:
        self.settings = settings.on_device()
        self.out = out
        self.command = command
        check_backend(settings.backend, self.settings.device)
        self._check_folder(resume)
        self.data = make_data(settings.dataset, settings.data_root, settings.batch_size, settings.seed)
        if not resume:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
            self._report.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(self._settings, json.dumps(self.settings.as_dict(), indent=2) + "\n")

    @property
    def _settings(self) -> Path:
        return self.out / "comparison.json"

    @property
    def _report(self) -> Path:
        return self.out / "report.json"

    @property
    def _checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _checkpoint(self, neuron: str) -> Path:
        return self._checkpoints / neuron / "last.ckpt"

    def _check_folder(self, resume: bool) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.out}")
        if not self._settings.exists():
            if self._checkpoints.exists():
                raise ValueError(f"out: {self._checkpoints} is no comparison's; name another folder")
            return
        if not resume:
            if self._checkpoints.exists() and not self._report.exists():
                raise ValueError(
                    f"out: {self.out} holds an unfinished comparison. Add --resume to go on with it, "
                    "name another folder, or delete this one"
                )
            return
        differences = self.settings.differences(json.loads(self._settings.read_text()))
        if differences:
            raise ValueError(f"resume: {self.out} was begun with other settings: {'; '.join(differences)}")
        for neuron in self.settings.neurons:
            self._check_checkpoint(self._checkpoint(neuron))

    def _check_checkpoint(self, checkpoint: Path) -> None:
        if not checkpoint.exists():
            return
        try:
            read_checkpoint(checkpoint)
        except ValueError as error:
            raise ValueError(f"resume: {error}. Delete it to train this neuron from the start") from error

    def network(self, neuron: str) -> CodedConvNet:
        """The network with that neuron, with the initial weights that the seed gives to all of them."""
        settings, dataset = self.settings, find_dataset(self.settings.dataset)
        torch.manual_seed(settings.seed)
        return mnist_network(
            neuron_factory(neuron, settings.time_steps, settings.backend),
            settings.time_steps,
            width=settings.width,
            in_channels=dataset.in_channels,
            image_size=dataset.image_size,
            classes=dataset.classes,
        )

    def run(self, console: Console | None = None) -> reports.Report:
        """Train, measure, and write ``report.json``, ``report.md`` and the pictures; returns the report.

        :raises KeyboardInterrupt: when interrupted, after Lightning has shut down
        """
        console = console or Console(quiet=True)
        results = {}
        for neuron in self.settings.neurons:
            console.print(f"[bold]{neuron}[/bold]")
            with cpu_threads(self.settings.threads):
                results[neuron] = self._train(neuron, progress=not console.quiet)
        report = {
            "settings": self.settings.as_dict(),
            "network": self.network(self.settings.neurons[0]).notation,
            "test_images": len(self.data.test),
            "neurons": results,
            "command": self.command,
            "environment": environment(),
        }
        report["pictures"] = draw(report, self.out)
        reports.write(report, self.out)
        return report

    def _train(self, neuron: str, progress: bool) -> dict[str, Any]:
        settings, checkpoint = self.settings, self._checkpoint(neuron)
        module = SpikingClassifier(self.network(neuron), settings.learning_rate, settings.epochs, settings.seed)
        history = History()
        device = torch.device(settings.device)
        trainer = make_trainer(
            Placement(device.type, [device.index] if device.type == "cuda" else 1),
            epochs=settings.epochs,
            checkpoint=checkpoint,
            callbacks=[history],
            progress=progress,
            logger=False,
            default_root_dir=self.out,
        )
        fit(trainer, module, self.data, checkpoint if checkpoint.exists() else None)
        return self._result(module.to(device), history.epochs)

    def _result(self, module: SpikingClassifier, history: list[dict[str, float]]) -> dict[str, Any]:
        # Of the training set, whose batches are as large as is said; those of the test set share it out evenly.
        images, labels = (part.to(module.device) for part in next(iter(self.data.train_dataloader())))
        cost = measure_step(module, images, labels)
        last = history[-1]
        return {
            "test_accuracy": last["test_accuracy"],
            "firing_rate": reports.by_layer(last, "firing_rate"),
            "k": reports.by_layer(last, "k"),
            "step_seconds": cost.seconds,
            "step_peak_bytes": cost.peak_bytes,
            "backend": backends_serving(module.net, images),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "history": history,
        }
