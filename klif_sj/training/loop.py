"""Lightning's trainer as every training here uses it."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy

from .. import runtime
from .checkpoint import AtomicCheckpointIO

__all__ = [
    "Placement",
    "check_backend",
    "cpu_threads",
    "fit",
    "is_first_process",
    "make_trainer",
    "quiet_lightning",
]


@dataclass(frozen=True)
class Placement:
    """Where a training runs: the kind of device, and how many processes with one device each."""

    accelerator: str
    devices: int | list[int]
    """A number of devices on each node, or the indices of those on this one."""
    nodes: int = 1

    @classmethod
    def find(cls, accelerator: str, devices: int | None) -> Placement:
        """The placement that ``accelerator`` and ``devices`` ask for, or, under torchrun, that torchrun has started.

        :param accelerator: ``'auto'``, ``'cpu'`` or ``'cuda'``; auto is the GPU where there is one
        :param devices: processes with a device each; None is one, or as many as torchrun has started
        :raises ValueError: for an accelerator that is unknown or absent, or more devices than there are
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if accelerator == "auto":
            accelerator = "cuda" if gpus else "cpu"
        if accelerator not in ("cpu", "cuda"):
            raise ValueError(f"accelerator: expected auto, cpu or cuda, got {accelerator!r}")
        nodes = 1
        if torch.distributed.is_torchelastic_launched():
            started = int(os.environ["LOCAL_WORLD_SIZE"])
            if devices not in (None, started):
                raise ValueError(f"devices: torchrun has started {started} processes on this node, got {devices}")
            devices, nodes = started, int(os.environ["WORLD_SIZE"]) // started
        devices = 1 if devices is None else devices
        if devices < 1:
            raise ValueError(f"devices: expected a positive integer, got {devices}")
        if accelerator == "cuda" and devices > gpus:
            raise ValueError(
                f"devices: this PyTorch ({torch.__version__}) sees {gpus} GPUs, got {devices}; see `klif-sj info`"
            )
        return cls(accelerator, devices, nodes)

    @property
    def processes(self) -> int:
        """The world size."""
        return self.nodes * (self.devices if isinstance(self.devices, int) else len(self.devices))


def is_first_process() -> bool:
    """Whether this process is the one, of a distributed training, that writes files and has the say on them."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def check_backend(backend: str, device: str) -> None:
    """:raises ValueError: for a backend that is unknown, cannot serve here, or does not serve this device"""
    try:
        runtime.require_backend(backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    runtime.serving_backend(backend, torch.empty(0, device=device))


def make_trainer(
    placement: Placement,
    *,
    epochs: int,
    checkpoint: Path,
    callbacks: Sequence[lightning.Callback],
    progress: bool,
    **options: Any,
) -> lightning.Trainer:
    """A trainer that saves ``checkpoint`` after every epoch, atomically.

    :param options: further ones of ``lightning.Trainer``
    """
    each_epoch = ModelCheckpoint(
        checkpoint.parent, checkpoint.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )
    with quiet_lightning():
        return lightning.Trainer(
            accelerator=placement.accelerator,
            devices=placement.devices,
            num_nodes=placement.nodes,
            strategy="auto" if placement.processes == 1 else DDPStrategy(),
            max_epochs=epochs,
            callbacks=[*callbacks, each_epoch, *([RichProgressBar(leave=False)] if progress else [])],
            plugins=[AtomicCheckpointIO()],
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=progress,
            use_distributed_sampler=False,
            **options,
        )


def fit(
    trainer: lightning.Trainer,
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    checkpoint: Path | None,
) -> None:
    """Train to the last epoch, from ``checkpoint`` on where there is one.

    :raises KeyboardInterrupt: when interrupted, after Lightning has shut down
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        with quiet_lightning():
            trainer.fit(module, data, ckpt_path=checkpoint)
    except SystemExit:  # Lightning's answer to Ctrl-C, of which it ignores any further
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences what it says about hardware, workers and its own products; warnings about the training stay."""
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
    """Has torch use this many CPU threads, where a number is given."""
    usual = torch.get_num_threads()
    torch.set_num_threads(number or usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
