"""One training by a recipe: where it runs, its folder, its checkpoints, its result."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from .. import runtime
from .._environment import environment
from ..models import SpikingNetwork, build_network, neuron_factory
from .atomic import write_json
from .checkpoint import AtomicCheckpointIO, read_checkpoint, recipe_in
from .classifier import History, SpikingClassifier, by_layer
from .data import make_data
from .data.batches import DataModule
from .data.catalogue import find_dataset
from .data.images import Split
from .divergence import StopOnDivergence
from .recipe import Recipe
from .step_cost import backends_serving

__all__ = ["Placement", "TrainingRun", "cpu_threads", "data_of", "is_first_process", "load_checkpoint", "network_of"]


def network_of(recipe: Recipe, *, keep_state: bool = True) -> SpikingNetwork:
    """The recipe's network, with the initial weights that its seed gives.

    :param keep_state: False for a training, which resets the states after every batch and reads none of them
    :raises ValueError: for an unknown network or data set, or an option that the network does not take
    """
    dataset = find_dataset(recipe.dataset)
    torch.manual_seed(recipe.seed)
    return build_network(
        recipe.network,
        neuron_factory(recipe.neuron, recipe.time_steps, recipe.backend, keep_state=keep_state),
        recipe.time_steps,
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        classes=dataset.classes,
        width=recipe.width,
        coding=recipe.coding,
        dropout=recipe.dropout,
    )


def data_of(
    recipe: Recipe, root: Path, batch_size: int | None = None, splits: dict[str, Split] | None = None
) -> DataModule:
    """The recipe's data set, in batches of the recipe's size unless another one is given; raises as ``make_data``."""
    return make_data(
        recipe.dataset,
        root,
        recipe.batch_size if batch_size is None else batch_size,
        recipe.seed,
        time_steps=recipe.time_steps,
        augmentations=recipe.augmentations,
        validation=recipe.validation,
        splits=splits,
    )


def load_checkpoint(path: str | Path) -> tuple[Recipe, SpikingNetwork]:
    """The recipe of a checkpoint that ``klif-sj train`` wrote, and its network with the trained weights, on the CPU.

    The network's neurons run with ``backend="auto"``, because the backend of the training may not be available here.
    They keep their states, so that a long sequence can be given to the network in parts.

    :raises FileNotFoundError: if there is no such file
    :raises ValueError: for a file that is damaged or no such checkpoint, or whose weights do not fit its recipe
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


@dataclass(frozen=True)
class Placement:
    """Where a training runs: the kind of device, and how many processes with one device each."""

    accelerator: str
    devices: int | list[int] = 1
    """The number of devices on each node, or a list with the index of the only device."""
    nodes: int = 1

    @classmethod
    def find(cls, device: str, processes: int | None = None) -> Placement:
        """The placement for these arguments or, under torchrun, the one that torchrun has started.

        :param device: ``'auto'``, ``'cpu'``, ``'cuda'`` or ``'cuda:N'``; auto means the GPU if there is one
        :param processes: the number of processes on this node, each with a device of its own; None means one, or as
            many as torchrun has started
        :raises ValueError: for a device that is unknown or absent, or more processes than there are devices
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        kind, colon, index = ("cuda" if gpus else "cpu", "", "") if device == "auto" else device.partition(":")
        if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdigit())):
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}")
        nodes = 1
        if torch.distributed.is_torchelastic_launched():
            started = int(os.environ["LOCAL_WORLD_SIZE"])
            if processes not in (None, started):
                raise ValueError(f"devices: torchrun has started {started} processes on this node, got {processes}")
            processes, nodes = started, int(os.environ["WORLD_SIZE"]) // started
        processes = 1 if processes is None else processes
        if processes < 1:
            raise ValueError(f"devices: expected a positive integer, got {processes}")
        if index and processes > 1:
            raise ValueError(f"devices: {device!r} is one device, got {processes} processes")
        if kind == "cuda" and gpus < (int(index) + 1 if index else processes):
            raise ValueError(
                f"device: {device!r} is not here for {processes} processes; this PyTorch ({torch.__version__}) sees "
                f"{gpus} GPUs. Use cpu, or see `klif-sj info`"
            )
        return cls(kind, [int(index)] if index else processes, nodes)

    @property
    def processes(self) -> int:
        """The world size."""
        return self.nodes * (self.devices if isinstance(self.devices, int) else len(self.devices))

    @property
    def device(self) -> torch.device:
        """The device of this process, if it is the only process."""
        return torch.device(self.accelerator, *(self.devices if isinstance(self.devices, list) else ()))


def is_first_process() -> bool:
    """Whether this is the process of a distributed training that writes and checks its files."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


class TrainingRun:
    """A training in the folder ``out``, which holds a checkpoint after every epoch, its logs and its result.

    :param recipe: what to train
    :param out: folder of ``checkpoints/last.ckpt``, ``logs`` (CSV and TensorBoard) and ``result.json``; it is created
        if it is missing
    :param data_root: folder of the data sets
    :param devices: the number of processes, each with a device of its own; None means one, or as many as torchrun has
        started
    :param accelerator: ``'auto'``, ``'cpu'``, ``'cuda'`` or ``'cuda:N'``
    :param resume: continue the interrupted training in ``out``, or begin if there is none
    :param overwrite: delete the training in ``out`` when this one begins
    :param command: the command line, for the result
    :param splits: a dict that keeps the data set; see :class:`~klif_sj.training.data.batches.DataModule`

    The constructor refuses all mistakes that a user can make, before anything is trained or deleted:

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
        overwrite: bool = False,
        command: str = "",
        splits: dict[str, Split] | None = None,
    ) -> None:
        self.recipe = recipe
        self.out = Path(out)
        self.command = command
        self.placement = Placement.find(accelerator, devices)
        self.precision = self._precision()
        _check_backend(recipe.backend, self.placement.device)
        self._overwrite = overwrite
        self._resumed = not overwrite and self._check_folder(resume)
        if recipe.batch_size % self.placement.processes:
            raise ValueError(
                f"batch_size: expected a multiple of the {self.placement.processes} processes, got {recipe.batch_size}"
            )
        self.data = data_of(recipe, data_root, recipe.batch_size // self.placement.processes, splits)
        self.module = SpikingClassifier(network_of(recipe, keep_state=False), recipe)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.out / "checkpoints" / "last.ckpt"

    @property
    def result(self) -> Path:
        """The JSON file with what :meth:`run` returned."""
        return self.out / "result.json"

    def _precision(self) -> str:
        on_gpu = self.placement.accelerator == "cuda"
        if self.recipe.precision == "auto":
            return "16-mixed" if on_gpu else "32-true"
        if self.recipe.precision == "16-mixed" and not on_gpu:
            raise ValueError("precision: 16-mixed needs a GPU; on the CPU there are 32-true, bf16-mixed and 64-true")
        return self.recipe.precision

    def _check_folder(self, resume: bool) -> bool:
        """Whether there is a checkpoint to continue from. Only the first process, which writes, refuses a folder."""
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
        """Train to the last epoch and write ``result.json``; returns its content. A finished run is not trained again.

        :raises KeyboardInterrupt: when interrupted, after Lightning has shut down
        :raises klif_sj.training.divergence.DivergenceError: if the loss or its gradient is NaN or infinite
        :raises OSError: if a checkpoint cannot be saved; the one before it stays
        """
        if self._overwrite:
            shutil.rmtree(self.out, ignore_errors=True)
        if self._resumed and self.result.exists():
            return json.loads(self.result.read_text())
        history, timer = History(), Timer()
        with _quiet_lightning():
            trainer = self._trainer([history, timer], progress=console is not None and not console.quiet)
            with cpu_threads(self.recipe.threads):
                _fit(trainer, self.module, self.data, self.checkpoint if self._resumed else None)
        result = self._result(history.epochs, timer.time_elapsed("train"))
        if trainer.is_global_zero:
            write_json(self.result, result)
        return result

    def _trainer(self, callbacks: list[lightning.Callback], progress: bool) -> lightning.Trainer:
        """Lightning's trainer, which saves a checkpoint after every epoch, atomically."""
        path, logs = self.checkpoint, self.out / "logs"
        callbacks += [
            StopOnDivergence(),
            LearningRateMonitor(logging_interval="epoch"),
            ModelCheckpoint(path.parent, path.stem, save_on_train_epoch_end=True, enable_version_counter=False),
        ]
        if progress:
            callbacks.append(RichProgressBar(leave=False))
        return lightning.Trainer(
            accelerator=self.placement.accelerator,
            devices=self.placement.devices,
            num_nodes=self.placement.nodes,
            strategy="auto" if self.placement.processes == 1 else DDPStrategy(),
            precision=self.precision,  # type: ignore[arg-type]
            benchmark=self.placement.accelerator == "cuda",
            gradient_clip_val=self.recipe.gradient_clip,
            max_epochs=self.recipe.epochs,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            # A resumed run writes into the next folder of CSV files; TensorBoard joins the files of one folder.
            logger=[CSVLogger(logs, name="csv"), TensorBoardLogger(logs, name="tensorboard", version="")],
            default_root_dir=self.out,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=progress,
            use_distributed_sampler=False,
        )

    def _result(self, history: list[dict[str, float]], seconds: float) -> dict[str, Any]:
        last, net, evaluated = history[-1], self.module.net, self.module.evaluated
        return {
            "recipe": self.recipe.as_dict(),
            "notation": net.notation,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "training_inputs": len(self.data.train),
            f"{evaluated}_inputs": len(self.data.evaluated),
            f"{evaluated}_accuracy": last[f"{evaluated}_accuracy"],
            "firing_rate": by_layer(last, "firing_rate"),
            "k": by_layer(last, "k"),
            "history": history,
            "seconds": seconds,
            "precision": self.precision,
            "processes": self.placement.processes,
            "backend": backends_serving(net, torch.empty(0, device=self.placement.device)),
            "command": self.command,
            "environment": environment(),
        }


def _check_backend(backend: str, device: torch.device) -> None:
    """Check that a backend can serve a device.

    :raises ValueError: for a backend that is unknown, cannot serve here, or does not serve this device
    """
    try:
        runtime.require_backend(backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    runtime.serving_backend(backend, torch.empty(0, device=device))


def _fit(
    trainer: lightning.Trainer, module: SpikingClassifier, data: lightning.LightningDataModule, checkpoint: Path | None
) -> None:
    """Train to the last epoch, from ``checkpoint`` on if there is one.

    :raises KeyboardInterrupt: when interrupted, after Lightning has shut down
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except SystemExit:  # Lightning raises it at the first Ctrl-C, and ignores any further one
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences Lightning's messages about hardware, workers and its own products; warnings about the training stay."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
            warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Within the block, torch uses this number of CPU threads, if it is not None."""
    usual = torch.get_num_threads()
    torch.set_num_threads(number or usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
