"""Settings and data sets of a training: what they hold, and what they refuse."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_close, assert_equal

from klif_sj.training import data
from klif_sj.training.data import make_data
from klif_sj.training.settings import Settings

pytestmark = pytest.mark.once


def settings(dataset: str = "digits", **given: Any) -> Settings:
    defaults = {"neurons": ("klif",), "backend": "auto", "device": "cpu", "seed": 0, "data_root": Path("data")}
    return Settings.for_dataset(dataset, **{**defaults, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"neurons": ("kliff",)}, "got 'kliff'; did you mean 'klif'"),
        ({"neurons": ()}, "neurons: expected at least one"),
        ({"epochs": 0}, "epochs: expected a positive integer, got 0"),
        ({"threads": 0}, "threads: expected a positive integer, got 0"),
        ({"time_steps": -1}, "time_steps: expected a positive integer, got -1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
        ({"width": float("inf")}, "width: expected a positive number, got inf"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
    ],
)
def test_settings_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**given)


def test_device_is_checked_and_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings(device="auto").on_device().device == "cpu"
    with pytest.raises(ValueError, match="'cuda' is not here; this PyTorch .* sees 0 GPUs"):
        settings(device="cuda").on_device()
    for wrong in ("gpu", "meta", "cuda:x"):
        with pytest.raises(ValueError, match=f"expected auto, cpu, cuda or cuda:N, got '{wrong}'"):
            settings(device=wrong).on_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [settings(device=name).on_device().device for name in ("auto", "cuda", "cuda:1")]
    assert found == ["cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match="'cuda:2' is not here"):
        settings(device="cuda:2").on_device()


def test_a_neuron_named_twice_is_trained_once() -> None:
    assert settings(neurons=("klif*", "KLIF", "klif-star", "klif")).neurons == ("klif-star", "klif")


def test_recipe_fills_what_is_not_given() -> None:
    paper = settings("mnist")
    assert (paper.epochs, paper.time_steps, paper.width, paper.learning_rate) == (100, 8, 1.0, 1e-4)
    assert settings("mnist", epochs=3, width=None) == replace(paper, epochs=3)


def test_digits_are_split_once_and_for_all() -> None:
    (train, train_labels), (test, test_labels) = data.load("digits", Path())
    assert (train.shape, test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (train.min(), train.max(), train.dtype) == (0, 1, torch.float32)
    assert test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    again = data.load("digits", Path())[1]
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
        data.load("fashion-mnist", fashion_files)


def test_too_short_data_file_is_refused(fashion_files: Path) -> None:
    write_idx(fashion_files / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte", np.zeros(9_999, dtype=np.uint8))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte: expected 10008 bytes, got 10007"):
        data.load("fashion-mnist", fashion_files)


@pytest.mark.parametrize(
    ("file", "position", "value"), [("train-images-idx3-ubyte", 2, 9), ("train-labels-idx1-ubyte", 100, 10)]
)
def test_corrupt_data_file_is_refused(fashion_files: Path, file: str, position: int, value: int) -> None:
    path = fashion_files / "FashionMNIST" / "raw" / file
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match="raw: the train files cannot be read"):
        data.load("fashion-mnist", fashion_files)


def test_missing_data_set_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: Any) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", unreachable)
    with pytest.raises(FileNotFoundError) as raised:
        data.load("fashion-mnist", tmp_path)
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
    assert len(data.load("fashion-mnist", fashion_files)[0][0]) == 60_000
