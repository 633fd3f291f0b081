"""A data set as batches on the device where a network is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import lightning
import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DistributedSampler

from .augment import Augmentation
from .catalogue import find_dataset
from .events import load_events
from .images import Split, load_images

__all__ = ["Batches", "DataModule", "Samples", "load"]

log = logging.getLogger(__name__)

DEVICE_SHARE = 0.5
"""The largest share of a GPU's free memory that a data set may take up. A larger data set stays on the host."""


def load(name: str, root: Path, split: str, time_steps: int | None = None) -> Split:
    """The training or the test set called ``name``, events integrated to ``time_steps`` frames.

    :param split: ``'train'`` or ``'test'``

    It raises the errors of :class:`DataModule`.
    """
    if find_dataset(name).kind == "image":
        return load_images(name, root, split)
    if time_steps is None or time_steps < 1:
        raise ValueError(f"time_steps: expected the number of frames a recording of {name}, got {time_steps}")
    return load_events(name, root, split, time_steps)


class Samples:
    """Some rows of a stored data set. Each device keeps only one copy of the data set, for all parts of it.

    :param inputs: images ``[N, C, H, W]`` or frames ``[N, T, C, H, W]``
    :param labels: their classes, ``[N]``
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels
        self.rows = torch.arange(len(labels))
        self._stored: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, positions: Tensor) -> Samples:
        """The samples at these positions."""
        part = Samples(self.inputs, self.labels)
        part.rows, part._stored = self.rows[positions], self._stored
        return part

    def stored(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All inputs and labels of the data set: on the device if they fit, else where they are."""
        if device not in self._stored:
            fits = self._fits(device)
            if not fits:
                log.warning("%s: the data set does not fit; its batches are gathered on the host", device)
            move = device if fits else self.inputs.device
            self._stored[device] = self.inputs.to(move), self.labels.to(move)
        return self._stored[device]

    def _fits(self, device: torch.device) -> bool:
        return device.type != "cuda" or self.inputs.nbytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


class Batches:
    """An epoch's batches ``(x, labels)``, made on the device: x is ``[N, C, H, W]`` or ``[T, N, C, H, W]``, float32.

    With a ``sampler``, whose epoch Lightning sets, the samples come in its order and are augmented at random. Without
    one, all samples come in their own order. They are shared out among the processes, so that each sample is in exactly
    one process and every process has the same number of batches.

    :param samples: the samples of the epoch
    :param batch_size: samples a batch, in each process
    :param augmentation: turns stored samples into network inputs
    :param device: device of the batches
    :param sampler: order of a training epoch
    :param rank: number of this process among ``world_size`` processes
    """

    batch_sampler = None
    """Lightning reads this attribute of every object that has a ``sampler``."""

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        augmentation: Augmentation,
        device: torch.device,
        *,
        sampler: DistributedSampler | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.augmentation, self.device = augmentation, device
        self.sampler, self.rank, self.world_size = sampler, rank, world_size

    def __len__(self) -> int:
        batches = -(-len(self.samples) // (self.batch_size * self.world_size))
        # The share of one process may be smaller by one sample, and even then none of its batches may be empty.
        return batches if self.sampler is not None else min(batches, max(1, len(self.samples) // self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = self.samples.stored(self.device)
        if self.sampler is None:
            positions = torch.arange(self.rank, len(self.samples), self.world_size)
            batches = positions.tensor_split(len(self))
        else:
            batches = torch.tensor(list(self.sampler)).split(self.batch_size)
        for number, positions in enumerate(batches):
            rows = self.samples.rows[positions].to(inputs.device, non_blocking=True)
            draw = None if self.sampler is None else (self.sampler.seed, self.sampler.epoch, number, self.rank)
            x = self.augmentation(inputs[rows].to(self.device, non_blocking=True), draw)
            yield (
                (x.transpose(0, 1).contiguous() if x.dim() == 5 else x),
                labels[rows].to(self.device, non_blocking=True),
            )


class DataModule(lightning.LightningDataModule):
    """A data set in memory, in batches on the trainer's device.

    The order of the training set depends on ``(seed, epoch, world size)`` alone, and the random numbers of augmentation
    on ``(seed, epoch, batch, rank)`` alone. So a resumed run gets the same batches as an uninterrupted one. This class
    shares out the samples among processes, so the Trainer must be made with ``use_distributed_sampler=False``.

    The validation loader gives the part of the training set that was put aside or, if none was, the test set. Then the
    accuracies by epoch are test accuracies, as in papers, and must not be used to choose anything.

    :param dataset: a key of :data:`klif_sj.training.data.catalogue.DATASETS`
    :param root: folder of all data sets
    :param batch_size: samples a batch, in each process
    :param seed: seed of the order and the augmentation
    :param time_steps: frames for each recording of events; images do not need it
    :param augmentations: some names of :data:`klif_sj.training.data.augment.AUGMENTATIONS`
    :param validation: the part of the training set that is not trained on, which the seed draws from each class: a
        fraction below 1, or a number of samples; 0 puts nothing aside
    :param splits: a dict that keeps the training and the test set once they are read. Data modules of one data set and
        T may share it. If a part of the training set is put aside, the test set is only read when it is used.

    :raises ValueError: for an unknown name, a number out of range, a batch larger than the training set, a broken file
    :raises FileNotFoundError: for a data set that is not there, saying where it comes from and what to type
    """

    def __init__(
        self,
        dataset: str,
        root: Path,
        batch_size: int,
        seed: int,
        *,
        time_steps: int | None = None,
        augmentations: Sequence[str] = (),
        validation: float = 0.0,
        splits: dict[str, Split] | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.info = dataset, find_dataset(dataset)
        self.augmentation = Augmentation(augmentations, self.info)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {batch_size}")
        self.root, self.time_steps = Path(root), time_steps
        self.splits: dict[str, Split] = {} if splits is None else splits
        self.batch_size = batch_size
        self.seed = seed
        self.train = self._samples("train")
        self.validation: Samples | None = None
        if validation:
            self.train, self.validation = _put_aside(self.train, validation, seed)
        self._require_full_batch(1)
        self.evaluated = self.test if self.validation is None else self.validation

    @cached_property
    def test(self) -> Samples:
        return self._samples("test")

    def _samples(self, split: str) -> Samples:
        if split not in self.splits:
            self.splits[split] = load(self.dataset, self.root, split, self.time_steps)
        return Samples(*self.splits[split])

    def train_dataloader(self) -> Batches:
        rank, world_size = self._place()
        self._require_full_batch(world_size)
        order: DistributedSampler = DistributedSampler(
            range(len(self.train)),  # type: ignore[arg-type]
            world_size,
            rank,
            seed=self.seed,
        )
        return self._batches(self.train, order)

    def val_dataloader(self) -> Batches:
        return self._batches(self.evaluated)

    def test_dataloader(self) -> Batches:
        return self._batches(self.test)

    def _batches(self, samples: Samples, order: DistributedSampler | None = None) -> Batches:
        rank, world_size = self._place()
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return Batches(
            samples, self.batch_size, self.augmentation, device, sampler=order, rank=rank, world_size=world_size
        )

    def _place(self) -> tuple[int, int]:
        """The number of this process, and the number of all processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _require_full_batch(self, world_size: int) -> None:
        if self.batch_size * world_size > len(self.train):
            noun = "images" if self.info.kind == "image" else "recordings"
            processes = f" in each of {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"batch_size: expected at most the {len(self.train)} training {noun} of {self.dataset}"
                f"{processes}, got {self.batch_size}"
            )


def _put_aside(samples: Samples, part: float, seed: int) -> tuple[Samples, Samples]:
    """Split the samples into those to train on, and the part of each class that is put aside."""
    labels = np.asarray(samples.labels)
    try:
        training, aside = train_test_split(np.arange(len(labels)), test_size=part, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(
            f"validation: expected a fraction or a number of the {len(labels)} training samples that leaves some of "
            f"each class on either side, got {part} ({error})"
        ) from error
    return tuple(samples.part(torch.from_numpy(np.sort(rows))) for rows in (training, aside))  # type: ignore[return-value]
