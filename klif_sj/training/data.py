"""The data sets, as Lightning data modules."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision import datasets

from .settings import find_dataset

__all__ = ["ImageData", "load"]

TORCHVISION = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}

Split = tuple[Tensor, ...]
"""Images ``[N, C, H, W]`` as float32 in [0, 1] or uint8, and their classes ``[N]``."""


class ImageData(lightning.LightningDataModule):
    """A data set held in memory, its pixels in [0, 1], without augmentation.

    Its validation loader is the test set: a comparison draws test accuracy by epoch, as the paper does, reports the
    last epoch's, and chooses nothing by it.

    :param name: a key of :data:`klif_sj.training.settings.DATASETS`
    :param root: folder of the torchvision data sets
    :param batch_size: images a batch
    :param seed: of the training set's order, which depends on nothing but seed and epoch

    :raises ValueError: for an unknown name, a batch larger than the training set, a broken file
    :raises FileNotFoundError: for a data set that is not there and cannot be downloaded
    """

    def __init__(self, name: str, root: Path, batch_size: int, seed: int) -> None:
        super().__init__()
        train, test = load(name, root)
        if batch_size > len(train[0]):
            raise ValueError(
                f"batch_size: expected at most the {len(train[0])} training images of {name}, got {batch_size}"
            )
        self.train, self.test = _Images(*train), _Images(*test)
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        # For its order by (seed, epoch), which Lightning sets: a resumed run meets the same batches.
        order: DistributedSampler = DistributedSampler(self.train, num_replicas=1, rank=0, seed=self.seed)
        return DataLoader(self.train, self.batch_size, sampler=order, collate_fn=tuple)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.batch_size, collate_fn=tuple)

    def on_after_batch_transfer(self, batch: Split, dataloader_idx: int) -> Split:
        images, labels = batch
        return (images.float() / 255 if images.dtype == torch.uint8 else images), labels


class _Images(TensorDataset):
    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """A whole batch in one indexing operation."""
        return self[torch.tensor(indices)]


def load(name: str, root: Path) -> tuple[Split, Split]:
    """The training and the test set called ``name``; errors as :class:`ImageData`."""
    find_dataset(name)
    return _digits() if name == "digits" else _torchvision(name, root)


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; a fixed fifth of each class is the test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])


def _torchvision(name: str, root: Path) -> tuple[Split, Split]:
    """The official split, downloaded where it is not under ``root``."""
    dataset = TORCHVISION[name]
    raw = root / dataset.__name__ / "raw"
    files = [raw / archive.removesuffix(".gz") for archive, _ in dataset.resources]
    if not all(file.is_file() for file in files):
        try:
            dataset(str(root), download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"{find_dataset(name).title} is not in {raw}, and its download failed ({error}).\n"
                f"Put {', '.join(file.name for file in files)} there; they come as .gz files from "
                f"{dataset.mirrors[0]}.\n"
                f"On a machine that reaches it, this fetches them: "
                f'python -c "from torchvision.datasets import {dataset.__name__}; '
                f"{dataset.__name__}('{root}', download=True)\""
            ) from error
    return _read(dataset, root, True), _read(dataset, root, False)


def _read(dataset: type[datasets.MNIST], root: Path, train: bool) -> Split:
    try:
        split = dataset(str(root), train=train)
        if len(split.data) != (60_000 if train else 10_000) or len(split.data) != len(split.targets):
            raise ValueError(f"{len(split.data)} images and {len(split.targets)} labels")
    except Exception as error:  # torchvision meets a broken file with whatever its parser stumbles over
        raise ValueError(
            f"{root / dataset.__name__ / 'raw'}: the {'training' if train else 'test'} set cannot be read ({error}). "
            "Delete the folder and run again to download it"
        ) from error
    return split.data.unsqueeze(1), split.targets
