"""The sets of still images, read into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from ..atomic import locked
from .catalogue import find_dataset

__all__ = ["Split", "load_images"]

Split = tuple[Tensor, Tensor]
"""Images ``[N, C, H, W]``, float32 in [0, 1] or uint8, or counts of events ``[N, T, C, H, W]``; the classes ``[N]``."""

TORCHVISION: dict[str, type[datasets.VisionDataset]] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}

CIFAR_BINARY: dict[str, tuple[int, dict[str, list[str]]]] = {
    "cifar10": (1, {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}),
    "cifar100": (2, {"train": ["train.bin"], "test": ["test.bin"]}),
}
"""For each data set the number of label bytes in a record, the last of which is the class, and the files by split."""


def load_images(name: str, root: Path, split: str) -> Split:
    """The training or the test set called ``name``.

    :param split: ``'train'`` or ``'test'``; the other one is not read
    :raises ValueError: for a broken file, naming it
    :raises FileNotFoundError: for a data set that is not there and cannot be downloaded
    """
    if name == "digits":
        return _digits(split)
    if name in CIFAR_BINARY and (root / find_dataset(name).folder).is_dir():
        return _cifar_binary(name, root, split)
    if name in CIFAR_BINARY:
        return _cifar_python(name, root, split)
    return _mnist(name, root, split)


def _digits(split: str) -> Split:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; a fixed fifth of each class is the test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    rows = train if split == "train" else test
    return images[rows], labels[rows]


def _mnist(name: str, root: Path, split: str) -> Split:
    """One part of the official split of an MNIST-like set, from its two files."""
    info, reader = find_dataset(name), TORCHVISION[name]
    folder = root / info.folder
    # Torchvision's order: training images and labels, test images and labels.
    files = [folder / archive.removesuffix(".gz") for archive, _ in reader.resources]
    if not all(file.is_file() for file in files):
        names = ", ".join(file.name for file in files)
        _download(name, root, f"{folder}: put {names} there, which {reader.mirrors[0]} has as .gz files.")
    images, labels = files[:2] if split == "train" else files[2:]
    _require_size(images, 16 + info.splits[split] * info.image_size**2)
    _require_size(labels, 8 + info.splits[split])
    try:
        dataset = reader(str(root), train=split == "train")
        if dataset.data.shape[1:] != (info.image_size, info.image_size) or dataset.targets.max() >= info.classes:
            raise ValueError(f"images of {tuple(dataset.data.shape[1:])} pixels, labels up to {dataset.targets.max()}")
    except Exception as error:  # torchvision's parser raises errors of many kinds for a broken file
        raise ValueError(
            f"{folder}: the {'train' if split == 'train' else 't10k'} files cannot be read ({error}). "
            "Delete them and run again to download them"
        ) from error
    return dataset.data.unsqueeze(1), dataset.targets


def _cifar_binary(name: str, root: Path, split: str) -> Split:
    """Read the official binary version. Its records hold the labels, then the planes of red, green and blue."""
    info = find_dataset(name)
    label_bytes, files = CIFAR_BINARY[name]
    pixels = info.in_channels * info.image_size**2
    images, labels = [], []
    for file in (root / info.folder / file for file in files[split]):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing from {info.title}'s binary version. Unpack the archive from {info.home} again"
            )
        _require_size(file, info.splits[split] // len(files[split]) * (label_bytes + pixels))
        records = torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(-1, label_bytes + pixels)
        classes = records[:, label_bytes - 1].long()
        if classes.max() >= info.classes:
            raise ValueError(
                f"{file}: expected classes below {info.classes}, got {classes.max()}; the file is corrupt. "
                "Delete it and get it again"
            )
        images.append(records[:, label_bytes:].reshape(-1, info.in_channels, info.image_size, info.image_size))
        labels.append(classes)
    return torch.cat(images), torch.cat(labels)


def _cifar_python(name: str, root: Path, split: str) -> Split:
    """Read torchvision's files. They are pickles, so they are opened only if their MD5 is the published one."""
    info, reader = find_dataset(name), TORCHVISION[name]
    folder = root / reader.base_folder
    files = {folder / file: md5 for file, md5 in (*reader.train_list, *reader.test_list)}
    files[folder / reader.meta["filename"]] = reader.meta["md5"]
    if not all(file.is_file() for file in files):
        binary = reader.url.replace("-python", "-binary")
        _download(name, root, f"{folder} or {root / info.folder}: unpack {reader.url} or {binary} in {root}.")
    for file, md5 in files.items():
        if not check_integrity(str(file), md5):
            raise ValueError(
                f"{file}: expected the file of {info.title} whose MD5 is {md5}; this one is truncated or corrupt. "
                "Delete it and run again to download it"
            )
    dataset = reader(str(root), train=split == "train")
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)


def _require_size(file: Path, size: int) -> None:
    """Check the size of a file in bytes.

    :raises ValueError: for a file of another size, naming it
    """
    if file.stat().st_size != size:
        raise ValueError(
            f"{file}: expected {size} bytes, got {file.stat().st_size}; the file is truncated or another's. "
            "Delete it and get it again"
        )


def _download(name: str, root: Path, missing: str) -> None:
    """Download a data set with torchvision.

    :raises FileNotFoundError: if that fails, saying where the data set comes from and what to type
    """
    info, reader = find_dataset(name), TORCHVISION[name]
    try:
        with locked(root):
            reader(str(root), download=True)
    except Exception as error:
        raise FileNotFoundError(
            f"{info.title} is not in {missing}\nIts download failed ({error}). Its home is {info.home}.\n"
            f'On a machine that reaches it, this fetches it: python -c "from torchvision.datasets import '
            f"{reader.__name__}; {reader.__name__}('{root}', download=True)\""
        ) from error
