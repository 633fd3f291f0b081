"""The digits and the MNIST-like sets: what they hold, where they are read from, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_close, assert_equal
from trainings import load_both

from klif_sj.training.data import make_data
from klif_sj.training.data.batches import load

pytestmark = pytest.mark.once


def test_digits_are_split_once_and_for_all() -> None:
    (train, train_labels), (test, test_labels) = load_both("digits", Path())
    assert (train.shape, test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (train.min(), train.max(), train.dtype) == (0, 1, torch.float32)
    assert test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    again = load_both("digits", Path())[1]
    assert_equal(again[0], test, "test images")
    pixels = {tuple(image.flatten().tolist()) for image in train}
    assert not any(tuple(image.flatten().tolist()) in pixels for image in test), "no test image is a training image"
    assert train_labels.shape == (1437,)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's files: magic number, sizes, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def fashion_files(tmp_path: Path) -> Path:
    """Files as Fashion-MNIST's, with pixels that tell where they come from."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images[:, 3, 5] = np.arange(count) % 256
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


def test_fashion_mnist_is_read_from_its_files(fashion_files: Path) -> None:
    module = make_data("fashion-mnist", fashion_files, batch_size=200, seed=0)
    images, labels = list(module.val_dataloader())[2]
    assert images.shape == (200, 1, 28, 28)
    assert_close(images[:, 0, 3, 5], torch.arange(400, 600) % 256 / 255.0, "pixels")
    assert labels.tolist() == [n % 10 for n in range(400, 600)]
    assert sum(len(labels) for _, labels in module.train_dataloader()) == 60_000


def test_broken_data_file_is_named(fashion_files: Path) -> None:
    path = fashion_files / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte: expected 7840016 bytes, got 1000"):
        load_both("fashion-mnist", fashion_files)


def test_too_short_data_file_is_refused(fashion_files: Path) -> None:
    write_idx(fashion_files / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte", np.zeros(9_999, dtype=np.uint8))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte: expected 10008 bytes, got 10007"):
        load_both("fashion-mnist", fashion_files)


@pytest.mark.parametrize(
    ("file", "position", "value"), [("train-images-idx3-ubyte", 2, 9), ("train-labels-idx1-ubyte", 100, 10)]
)
def test_corrupt_data_file_is_refused(fashion_files: Path, file: str, position: int, value: int) -> None:
    path = fashion_files / "FashionMNIST" / "raw" / file
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match="raw: the train files cannot be read"):
        load_both("fashion-mnist", fashion_files)


def test_missing_data_set_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: Any) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", unreachable)
    with pytest.raises(FileNotFoundError) as raised:
        load_both("fashion-mnist", tmp_path)
    told = str(raised.value)
    assert told.startswith(f"Fashion-MNIST is not in {tmp_path / 'FashionMNIST' / 'raw'}")
    assert "no route to host" in told
    assert "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/" in told
    assert f"FashionMNIST('{tmp_path}', download=True)" in told


def test_downloaded_archives_are_used(fashion_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = fashion_files / "FashionMNIST" / "raw"
    served = {file.name: gzip.compress(file.read_bytes(), 1) for file in raw.iterdir()}
    for file in raw.iterdir():
        file.unlink()

    def download(self: Any) -> None:
        for name, archive in served.items():
            Path(self.raw_folder, name).write_bytes(gzip.decompress(archive))

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    assert len(load_both("fashion-mnist", fashion_files)[0][0]) == 60_000


def test_of_a_split_that_is_not_asked_for_nothing_is_read(fashion_files: Path) -> None:
    for file in (fashion_files / "FashionMNIST" / "raw").glob("t10k*"):
        file.write_bytes(b"broken")
    assert len(load("fashion-mnist", fashion_files, "train")[1]) == 60_000
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte: expected 7840016 bytes, got 6"):
        load("fashion-mnist", fashion_files, "test")
