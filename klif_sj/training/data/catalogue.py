"""Facts about the data sets, without reading them. The command line needs them first, so the module imports quickly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..._checks import nearest

__all__ = ["DATASETS", "DatasetInfo", "find_dataset"]


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set before it is read."""

    title: str
    kind: Literal["image", "events"]
    """Still images, which a network repeats at every time step, or events integrated to one frame a time step."""
    image_size: int
    """Pixels a side; all images and frames are square."""
    in_channels: int
    """Colours, or the two polarities of an event."""
    classes: int
    splits: Mapping[str, int]
    """Samples of ``train`` and ``test``; files that hold another number are refused."""
    home: str
    """The page that it comes from."""
    folder: str = ""
    """Its folder within the folder of all data sets; empty if it comes with a library."""
    mean: tuple[float, ...] = ()
    """The mean of the training set's pixels in [0, 1], by channel; empty for event counts, which are not normalised."""
    std: tuple[float, ...] = ()


DATASETS = {
    "digits": DatasetInfo(
        "scikit-learn's digits",
        "image",
        image_size=8,
        in_channels=1,
        classes=10,
        splits={"train": 1437, "test": 360},
        home="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        mean=(0.3054,),
        std=(0.3761,),
    ),
    "mnist": DatasetInfo(
        "MNIST",
        "image",
        image_size=28,
        in_channels=1,
        classes=10,
        splits={"train": 60_000, "test": 10_000},
        home="http://yann.lecun.com/exdb/mnist/",
        folder="MNIST/raw",
        mean=(0.1307,),
        std=(0.3081,),
    ),
    "fashion-mnist": DatasetInfo(
        "Fashion-MNIST",
        "image",
        image_size=28,
        in_channels=1,
        classes=10,
        splits={"train": 60_000, "test": 10_000},
        home="https://github.com/zalandoresearch/fashion-mnist",
        folder="FashionMNIST/raw",
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "cifar10": DatasetInfo(
        "CIFAR-10",
        "image",
        image_size=32,
        in_channels=3,
        classes=10,
        splits={"train": 50_000, "test": 10_000},
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        folder="cifar-10-batches-bin",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": DatasetInfo(
        "CIFAR-100",
        "image",
        image_size=32,
        in_channels=3,
        classes=100,
        splits={"train": 50_000, "test": 10_000},
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        folder="cifar-100-binary",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "n-mnist": DatasetInfo(
        "N-MNIST",
        "events",
        image_size=34,
        in_channels=2,
        classes=10,
        splits={"train": 60_000, "test": 10_000},
        home="https://www.garrickorchard.com/datasets/n-mnist",
        folder="NMNIST",
    ),
    "cifar10-dvs": DatasetInfo(
        "CIFAR10-DVS",
        "events",
        image_size=128,
        in_channels=2,
        classes=10,
        splits={"train": 9_000, "test": 1_000},
        home="https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671",
        folder="CIFAR10DVS",
    ),
    "dvs-gesture": DatasetInfo(
        "DVS128 Gesture",
        "events",
        image_size=128,
        in_channels=2,
        classes=11,
        splits={"train": 1_176, "test": 288},
        home="https://research.ibm.com/interactive/dvsgesture/",
        folder="DVS128Gesture",
    ),
}


def find_dataset(name: str) -> DatasetInfo:
    """The data set with this name.

    :raises ValueError: for an unknown data set, suggesting the nearest name
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}{nearest(name, DATASETS)}")
    return DATASETS[name]
